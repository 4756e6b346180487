//! With the feature `cuda`: compiles every `*.cu` of this folder with nvcc for sm_80 and sm_90a,
//! and writes OUT_DIR/modules.rs, a table of names and machine code. Without it: nothing.
//!
//! nvcc is looked for in NVCC, CUDA_HOME/bin and PATH, in this order; neither GPU nor driver is
//! needed.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Architectures with machine code of their own: A100 and its generation, H100 and H200.
const ARCHITECTURES: [&str; 2] = ["80", "90a"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(fault) = compile_all() {
        // One `cargo::error` is one line; nvcc's own words can be many.
        for line in fault.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn compile_all() -> Result<(), String> {
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let nvcc = find_nvcc();
    let mut table = String::from("const MODULES: &[(&str, &[u8])] = &[\n");
    for source in sources()? {
        let stem = source.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let image = out.join(format!("{stem}.fatbin"));
        compile(&nvcc, &source, &image)?;
        let _ =
            writeln!(table, "    ({stem:?}, include_bytes!({:?})),", image.display().to_string());
    }
    table.push_str("];\n");
    fs::write(out.join("modules.rs"), table).map_err(|e| format!("modules.rs: {e}"))
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(".").map_err(|e| format!("kernels: {e}"))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    files.sort();
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    files.retain(|file| file.extension().is_some_and(|e| e == "cu"));
    Ok(files)
}

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    home.filter(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into())
}

fn compile(nvcc: &Path, source: &Path, image: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-fatbin"]);
    for architecture in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    let output = command.arg("-o").arg(image).arg(source).output().map_err(|e| {
        format!(
            "the feature cuda needs nvcc, and {} did not start: {e}; `.ci/nvcc.sh FOLDER` fetches \
             one, then `. FOLDER/env.sh`, or set NVCC or CUDA_HOME",
            nvcc.display()
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("nvcc refused kernels/{}:\n{said}", source.display()))
}
