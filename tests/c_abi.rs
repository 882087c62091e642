//! The C ABI as its users meet it: real C and C++ programs, compiled against `include/kvxfer.h` and linked with the library of this build.
//! They run as they are, with `AddressSanitizer`, and under Valgrind.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use support::header::{Header, ROOT};
use support::program::{
    Mode, command, compile, have, library_dir, run, run_pair, run_source, scratch, succeed,
};

macro_rules! programs {
    ($($program:ident)*) => {
        $(mod $program {
            use super::*;
            #[test]
            fn plain() { run(stringify!($program), Mode::Plain); }
            #[test]
            fn address_sanitizer() { run(stringify!($program), Mode::Asan); }
            #[test]
            fn valgrind() { run(stringify!($program), Mode::Valgrind); }
        })*
    };
}
programs! { lifecycle misuse threads forked signals logging }

mod wrappers {
    use super::*;

    fn wrapped(mode: Mode) {
        if have("c++") {
            run_source(&Path::new(ROOT).join("tests/c/wrappers.cpp"), mode);
        }
    }
    #[test]
    fn plain() {
        wrapped(Mode::Plain);
    }
    #[test]
    fn address_sanitizer() {
        wrapped(Mode::Asan);
    }
    #[test]
    fn valgrind() {
        wrapped(Mode::Valgrind);
    }

    /// The same program on device memory: under the stand-in driver, whose account must be empty at the end, or with `KVXFER_TEST_GPU=1` on
    /// this machine's GPU.
    fn on_a_device(mode: Mode) {
        let real = std::env::var_os("KVXFER_TEST_GPU").is_some();
        if !have("c++") || !(real || kvxfer_cuda_standin::available()) {
            return;
        }
        let dir = scratch();
        let binary = compile(&Path::new(ROOT).join("tests/c/wrappers.cpp"), dir.path(), mode);
        let report = dir.path().join("report");
        let mut run = command(&binary, mode);
        run.arg("device");
        if !real {
            let folders = [library_dir(), kvxfer_cuda_standin::folder()];
            run.env("LD_LIBRARY_PATH", std::env::join_paths(folders).expect("two folders"))
                .env("KVXSTANDIN_REPORT", &report)
                .env_remove("CUDA_VISIBLE_DEVICES");
        }
        let said = succeed(&mut run);
        assert!(said.lines().any(|line| line == "OK"), "{said}");
        if !real {
            let left = std::fs::read_to_string(&report).expect("the stand-in's account");
            assert!(left.contains("\"live\":{}"), "left behind: {left}");
        }
    }
    #[test]
    fn device_plain() {
        on_a_device(Mode::Plain);
    }
    #[test]
    fn device_address_sanitizer() {
        on_a_device(Mode::Asan);
    }
}

mod nulls {
    use super::*;

    fn run_generated(mode: Mode) {
        let program = support::nulls::generate(&Header::read());
        assert!(program.calls > 250, "only {} calls were generated", program.calls);
        let dir = scratch();
        let source = dir.path().join("nulls.c");
        std::fs::write(&source, program.text).expect("write the program");
        run_source(&source, mode);
    }
    #[test]
    fn plain() {
        run_generated(Mode::Plain);
    }
    #[test]
    fn address_sanitizer() {
        run_generated(Mode::Asan);
    }
    #[test]
    fn valgrind() {
        run_generated(Mode::Valgrind);
    }
}

mod examples {
    use super::*;

    fn pair(source: &str, first: &str, second: &str, mode: Mode) {
        if !have("cc") || !have("c++") {
            return;
        }
        let out = scratch();
        let binary = compile(&Path::new(ROOT).join("examples").join(source), out.path(), mode);
        let (mut one, mut two) = (command(&binary, mode), command(&binary, mode));
        one.arg(first);
        two.arg(second);
        run_pair(one, two);
    }
    #[test]
    fn one_sided_write() {
        pair("c/one_sided_write.c", "target", "writer", Mode::Plain);
    }
    #[test]
    fn one_sided_write_address_sanitizer() {
        pair("c/one_sided_write.c", "target", "writer", Mode::Asan);
    }
    #[test]
    fn sender_receiver() {
        pair("c/sender_receiver.c", "receiver", "sender", Mode::Plain);
    }
    #[test]
    fn sender_receiver_address_sanitizer() {
        pair("c/sender_receiver.c", "receiver", "sender", Mode::Asan);
    }
    #[test]
    fn sender_receiver_cpp() {
        pair("cpp/sender_receiver.cpp", "receiver", "sender", Mode::Plain);
    }
    #[test]
    fn sender_receiver_cpp_address_sanitizer() {
        pair("cpp/sender_receiver.cpp", "receiver", "sender", Mode::Asan);
    }
}

/// A bug in C that the sanitizer and Valgrind must find: shows that both really look.
mod checkers {
    use super::*;

    const BUG: &str = r#"
        #include "fixture.h"
        int main(void) {
          char *buffer = malloc(2);
          size_t length = 0;
          kvxfer_agent_t *agent = fixture_agent("name", 0);
          (void)kvxfer_agent_name(agent, buffer, 64, &length); /* 64 is a lie: the library writes 5 bytes */
          OK(kvxfer_agent_free(agent));
          free(buffer);
          puts("OK");
          return 0;
        }
    "#;

    fn finds(mode: Mode, words: &str) {
        if !have("cc") || (mode == Mode::Valgrind && !have("valgrind")) {
            return;
        }
        let dir = scratch();
        let source = dir.path().join("bug.c");
        std::fs::write(&source, BUG).expect("write the program");
        let out = command(&compile(&source, dir.path(), mode), mode).output().expect("run");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(words), "{mode:?} found nothing: {text}");
    }
    #[test]
    fn address_sanitizer_sees_writes_of_the_library() {
        finds(Mode::Asan, "heap-buffer-overflow");
    }
    #[test]
    fn valgrind_sees_writes_of_the_library() {
        finds(Mode::Valgrind, "Invalid write");
    }
}

#[test]
fn only_the_interface_is_exported_under_its_soname() {
    if !have("nm") || !have("readelf") {
        return;
    }
    let library = library_dir().join("libkvxfer.so");
    let symbols = succeed(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library));
    let exported: BTreeSet<_> =
        symbols.lines().filter_map(|l| l.split(' ').next()).map(str::to_owned).collect();
    let declared: BTreeSet<_> = Header::read().functions.into_iter().map(|f| f.name).collect();
    assert_eq!(exported, declared, "exported symbols and include/kvxfer.h differ");
    let dynamic = succeed(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("Library soname: [libkvxfer.so.0]"), "{dynamic}");
    assert!(library_dir().join("libkvxfer.so.0").exists(), "build.rs made no libkvxfer.so.0");
}

#[test]
fn installed_library_is_found_by_pkg_config_and_cmake() {
    if !have("cc") || !have("c++") || !have("pkg-config") {
        return;
    }
    // What `cargo build` leaves in one folder, from the folder of the tests.
    let dir = scratch();
    let (build, prefix) = (dir.path().join("build"), dir.path().join("prefix"));
    std::fs::create_dir(&build).expect("folder");
    for file in ["libkvxfer.so", "libkvxfer.a"] {
        std::os::unix::fs::symlink(library_dir().join(file), build.join(file)).expect("link");
    }
    std::fs::write(build.join("kvxfer"), "#!/bin/sh\n").expect("stand-in for the command");
    let install = |prefix: &Path, destdir: &str| {
        succeed(
            Command::new(Path::new(ROOT).join("scripts/install.sh"))
                .arg(prefix)
                .env("BUILD_DIR", &build)
                .env("DESTDIR", destdir)
                .env_remove("LIBDIR")
                .env_remove("INCLUDEDIR"),
        )
    };
    install(&prefix, "");
    let lib = prefix.join("lib");
    for file in [
        "lib/libkvxfer.so",
        "lib/libkvxfer.so.0",
        "lib/libkvxfer.a",
        "include/kvxfer.h",
        "include/kvxfer.hpp",
    ]
    .into_iter()
    .chain(["bin/kvxfer", "share/doc/kvxfer/LICENSE"])
    {
        assert!(prefix.join(file).exists(), "{file} is missing");
    }

    let flags = succeed(
        Command::new("pkg-config")
            .args(["--cflags", "--libs", "kvxfer"])
            .env("PKG_CONFIG_PATH", lib.join("pkgconfig")),
    );
    let version = succeed(
        Command::new("pkg-config")
            .args(["--modversion", "kvxfer"])
            .env("PKG_CONFIG_PATH", lib.join("pkgconfig")),
    );
    assert_eq!(version.trim(), env!("CARGO_PKG_VERSION"));
    let binary = dir.path().join("through-pkg-config");
    succeed(
        Command::new("cc")
            .arg(format!("{ROOT}/examples/c/one_sided_write.c"))
            .arg("-o")
            .arg(&binary)
            .args(flags.split_whitespace()),
    );
    let start = |binary: &Path, role: &str| {
        let mut command = Command::new(binary);
        command.env("LD_LIBRARY_PATH", &lib).arg(role);
        command
    };
    run_pair(start(&binary, "target"), start(&binary, "writer"));

    if have("cmake") {
        let project = dir.path().join("project");
        std::fs::create_dir(&project).expect("folder");
        std::fs::write(project.join("CMakeLists.txt"), cmake_project()).expect("write");
        succeed(
            Command::new("cmake")
                .arg("-S")
                .arg(&project)
                .arg("-B")
                .arg(project.join("build"))
                .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())),
        );
        succeed(Command::new("cmake").arg("--build").arg(project.join("build")));
        for binary in ["shared", "static"].map(|b| project.join("build").join(b)) {
            run_pair(start(&binary, "receiver"), start(&binary, "sender"));
        }
    }

    // Staged for a package: files below DESTDIR, paths inside them without it.
    let stage = dir.path().join("stage");
    install(Path::new("/opt/kvxfer"), stage.to_str().expect("UTF-8"));
    let pc = std::fs::read_to_string(stage.join("opt/kvxfer/lib/pkgconfig/kvxfer.pc")).expect("kvxfer.pc");
    assert!(pc.contains("prefix=/opt/kvxfer\n") && !pc.contains("stage"), "{pc}");
    assert!(!pc.contains('@'), "{pc}");
}

fn cmake_project() -> String {
    format!(
        "cmake_minimum_required(VERSION 3.15)\nproject(consumer C CXX)\nset(CMAKE_CXX_STANDARD 17)\n\
         find_package(kvxfer {} REQUIRED)\n\
         add_executable(shared {ROOT}/examples/cpp/sender_receiver.cpp)\n\
         target_link_libraries(shared PRIVATE kvxfer::kvxfer)\n\
         add_executable(static {ROOT}/examples/c/sender_receiver.c)\n\
         target_link_libraries(static PRIVATE kvxfer::kvxfer_static)\n",
        env!("CARGO_PKG_VERSION")
    )
}
