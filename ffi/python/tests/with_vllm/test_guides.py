"""The configuration files of LMCache's two guides, copied letter by letter, drive real servers."""

import pathlib
import re

import pytest
from asking import ask, gauge, prompt
from stack import Stack

GUIDES = pathlib.Path(__file__).resolve().parents[4] / "crates" / "kvxfer-lmcache" / "tests" / "guides"
PORTS = {
    "1p1d": {"init": [7300], "alloc": [7400], "notify": 7500},
    "xpyd": {"init": [55555], "alloc": [55556], "notify": 7500},
}
# Per guide, what each server says of its file, once: keys with their names of today.
SAID = {
    "1p1d": {"prefiller": ["nixl_buffer_device is called pd_buffer_device today"], "decoder": []},
    "xpyd": {
        role: [
            "enable_nixl is called enable_pd today",
            "nixl_role is called pd_role today",
            "nixl_peer_port is called pd_peer_init_port today",
            "nixl_buffer_size is called pd_buffer_size today",
            "nixl_enable_gc has no counterpart",
        ]
        for role in ("prefiller", "decoder")
    },
}


@pytest.mark.parametrize("guide", ["1p1d", "xpyd"])
def test_a_guides_files_as_written_start_a_working_pair(guide):
    files = {role: GUIDES / f"{guide}-{role}.yaml" for role in ("prefiller", "decoder")}
    # The first guide's file names LMCache's own channel, which then stays in use.
    channel = "nixl" if guide == "1p1d" else "kvxfer"
    with Stack("kvxfer", channel, files=files, ports=PORTS[guide]) as stack:
        prompts = [prompt(n, f"{guide} {n}") for n in (200, 700)]
        assert [ask(stack.proxy, p) for p in prompts] == [ask(stack.decoder, p) for p in prompts]
        for role, notices in SAID[guide].items():
            log = stack.log(role).read_text()
            assert [log.count(notice) for notice in notices] == [1] * len(notices), role
        assert re.search("LMCache hit tokens: [5-7]", stack.log("decoder").read_text()), (
            "the second prompt's cache has come"
        )
        if channel == "kvxfer":
            assert gauge(stack.decoder, "kvxfer_pd_loaded_chunks_total") > 0
