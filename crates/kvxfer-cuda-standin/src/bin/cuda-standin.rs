//! Prints the folder of the stand-in driver, for `LD_LIBRARY_PATH`; nothing where it could not be built.
#![expect(clippy::print_stdout, reason = "its purpose")]

fn main() {
    if kvxfer_cuda_standin::available() {
        println!("{}", kvxfer_cuda_standin::folder().display());
    }
}
