//! The C functions of NIXL that `nixl-sys` resolves at run time, and which of them this library reaches.
//!
//! `nixl-sys` aborts the process when a function it calls is missing, so all of [`USED`] are looked up before the
//! first call. [`UNUSED`] exists for the test below: when a newer `nixl-sys` resolves a function that is in neither
//! list, somebody has to decide whether a call of ours reaches it.

/// Functions that calls made here reach; a library that lacks one is refused.
pub(super) const USED: &[&str] = &[
    "nixl_capi_create_backend",
    "nixl_capi_create_configured_agent",
    "nixl_capi_create_notif_map",
    "nixl_capi_create_opt_args",
    "nixl_capi_create_params",
    "nixl_capi_create_reg_dlist",
    "nixl_capi_create_xfer_dlist",
    "nixl_capi_create_xfer_req",
    "nixl_capi_deregister_mem",
    "nixl_capi_destroy_agent",
    "nixl_capi_destroy_backend",
    "nixl_capi_destroy_mem_list",
    "nixl_capi_destroy_notif_map",
    "nixl_capi_destroy_opt_args",
    "nixl_capi_destroy_params",
    "nixl_capi_destroy_reg_dlist",
    "nixl_capi_destroy_string_list",
    "nixl_capi_destroy_xfer_dlist",
    "nixl_capi_destroy_xfer_req",
    "nixl_capi_gen_notif",
    "nixl_capi_get_available_plugins",
    "nixl_capi_get_backend_params",
    "nixl_capi_get_local_md",
    "nixl_capi_get_local_partial_md",
    "nixl_capi_get_notifs",
    "nixl_capi_get_plugin_params",
    "nixl_capi_get_xfer_status",
    "nixl_capi_invalidate_remote_md",
    "nixl_capi_load_remote_md",
    "nixl_capi_mem_list_get",
    "nixl_capi_mem_list_is_empty",
    "nixl_capi_mem_list_size",
    "nixl_capi_mem_type_to_string",
    "nixl_capi_notif_map_clear",
    "nixl_capi_notif_map_get_agent_at",
    "nixl_capi_notif_map_get_notif",
    "nixl_capi_notif_map_get_notifs_size",
    "nixl_capi_notif_map_size",
    "nixl_capi_opt_args_add_backend",
    "nixl_capi_params_add",
    "nixl_capi_post_xfer_req",
    "nixl_capi_reg_dlist_add_desc",
    "nixl_capi_reg_dlist_clear",
    "nixl_capi_register_mem",
    "nixl_capi_release_xfer_req",
    "nixl_capi_string_list_get",
    "nixl_capi_string_list_size",
    "nixl_capi_xfer_dlist_add_desc",
    "nixl_capi_xfer_dlist_clear",
];

/// Functions `nixl-sys` knows and nothing here calls; a library may lack them.
#[cfg(test)]
const UNUSED: &[&str] = &[
    "nixl_capi_agent_make_connection",
    "nixl_capi_check_remote_md",
    "nixl_capi_create_agent",
    "nixl_capi_create_query_resp_list",
    "nixl_capi_create_remote_dlist",
    "nixl_capi_destroy_query_resp_list",
    "nixl_capi_destroy_remote_dlist",
    "nixl_capi_estimate_xfer_cost",
    "nixl_capi_fetch_remote_md",
    "nixl_capi_get_xfer_telemetry",
    "nixl_capi_invalidate_local_md",
    "nixl_capi_make_xfer_req",
    "nixl_capi_opt_args_get_custom_param",
    "nixl_capi_opt_args_get_has_notif",
    "nixl_capi_opt_args_get_notif_msg",
    "nixl_capi_opt_args_get_skip_desc_merge",
    "nixl_capi_opt_args_set_custom_param",
    "nixl_capi_opt_args_set_has_notif",
    "nixl_capi_opt_args_set_ip_addr",
    "nixl_capi_opt_args_set_notif_msg",
    "nixl_capi_opt_args_set_port",
    "nixl_capi_opt_args_set_skip_desc_merge",
    "nixl_capi_params_create_iterator",
    "nixl_capi_params_destroy_iterator",
    "nixl_capi_params_is_empty",
    "nixl_capi_params_iterator_next",
    "nixl_capi_prep_mem_view_local",
    "nixl_capi_prep_mem_view_remote",
    "nixl_capi_prep_xfer_dlist",
    "nixl_capi_query_mem",
    "nixl_capi_query_resp_list_get_params",
    "nixl_capi_query_resp_list_has_value",
    "nixl_capi_query_resp_list_size",
    "nixl_capi_query_xfer_backend",
    "nixl_capi_reg_dlist_desc_count",
    "nixl_capi_reg_dlist_get_type",
    "nixl_capi_reg_dlist_is_empty",
    "nixl_capi_reg_dlist_print",
    "nixl_capi_reg_dlist_rem_desc",
    "nixl_capi_reg_dlist_resize",
    "nixl_capi_reg_dlist_trim",
    "nixl_capi_release_mem_view",
    "nixl_capi_release_xfer_dlist_handle",
    "nixl_capi_remote_dlist_add_desc",
    "nixl_capi_send_local_md",
    "nixl_capi_send_local_partial_md",
    "nixl_capi_xfer_dlist_desc_count",
    "nixl_capi_xfer_dlist_get_type",
    "nixl_capi_xfer_dlist_is_empty",
    "nixl_capi_xfer_dlist_len",
    "nixl_capi_xfer_dlist_print",
    "nixl_capi_xfer_dlist_rem_desc",
    "nixl_capi_xfer_dlist_resize",
    "nixl_capi_xfer_dlist_trim",
];

#[cfg(test)]
mod tests {
    use super::{UNUSED, USED};
    use std::collections::BTreeSet;
    use std::path::PathBuf;
    use std::process::Command;

    fn output(program: &str, default: &str, args: &[&str]) -> String {
        let program = std::env::var_os(program).unwrap_or_else(|| default.into());
        let out =
            Command::new(&program).args(args).output().expect("the toolchain that built this test is here");
        assert!(out.status.success(), "{program:?} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    }

    /// Folder of the `nixl-sys` this build was resolved to.
    fn nixl_sys() -> PathBuf {
        let version = output("RUSTC", "rustc", &["-vV"]);
        let host = version.lines().find_map(|l| l.strip_prefix("host: ")).expect("rustc names its host");
        // Of this platform only: the other platforms' dependencies have not been downloaded.
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let args = [
            "metadata",
            "--format-version=1",
            "--offline",
            "--filter-platform",
            host,
            "--manifest-path",
            manifest,
        ];
        let metadata: serde_json::Value =
            serde_json::from_str(&output("CARGO", "cargo", &args)).expect("cargo metadata is JSON");
        let package = metadata["packages"]
            .as_array()
            .and_then(|all| all.iter().find(|p| p["name"] == "nixl-sys"))
            .expect("nixl-sys is a dependency");
        let manifest = PathBuf::from(package["manifest_path"].as_str().expect("has a manifest"));
        manifest.parent().expect("a file lies in a folder").to_owned()
    }

    #[test]
    fn the_lists_are_what_nixl_sys_resolves() {
        let source = std::fs::read_to_string(nixl_sys().join("stubs.cpp")).expect("stubs.cpp is published");
        let resolved: BTreeSet<&str> =
            source.split("resolve(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(resolved.len() > 50, "stubs.cpp is not as expected: {} names found", resolved.len());
        let listed: BTreeSet<&str> = USED.iter().chain(UNUSED).copied().collect();
        assert_eq!(listed.len(), USED.len() + UNUSED.len(), "a name is listed twice");
        let unknown: Vec<_> = resolved.difference(&listed).collect();
        let gone: Vec<_> = listed.difference(&resolved).collect();
        assert!(
            unknown.is_empty() && gone.is_empty(),
            "not in our lists: {unknown:?}; no longer resolved: {gone:?}"
        );
    }
}
