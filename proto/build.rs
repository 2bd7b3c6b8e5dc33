//! Compiles the `.proto` files with protox, so that no `protoc` needs to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=dr_agent");
    let files = protox::compile(
        [
            "dr_agent/changelog/v1/changelog.proto",
            "dr_agent/journal/v1/journal.proto",
        ],
        ["."],
    )?;
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}
