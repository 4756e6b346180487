//! A model in the engine: description, weights, and where they come from and go to.

use super::offload::Parked;
use super::phase::{ModelSource, Role};
use super::transfers::Transfers;
use crate::checkpoint::model_json::CONFIG_FILE;
use crate::checkpoint::{TensorFolder, disk_fault, read_model_config};
use crate::config::ModelConfig;
use crate::config::fault::Fault;
use crate::config::limited::read_limited_text;
use crate::model::{Layout, Params, PassError, Transformer};
use anyhow::Result;
use rehearsal_kernels::{Kernels, Kind};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// The file of a reward model's calibration.
const REWARD_FILE: &str = "reward.json";
const REWARD_LIMIT: u64 = 1 << 16;

/// Mean and deviation that calibrate a reward model's score; saved beside its weights as `reward.json`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Mean raw score.
    pub mean: f64,
    /// Deviation of the raw scores, above 0.
    pub deviation: f64,
}

impl Default for Calibration {
    fn default() -> Self {
        Calibration { mean: 0.0, deviation: 1.0 }
    }
}

/// A model whose weights may be parked.
pub struct Resident {
    /// The description.
    pub model: Transformer,
    /// The weights.
    pub weights: Parked,
    /// A reward model's calibration.
    pub calibration: Calibration,
}

/// The config of a model that starts from `source`: the run's, with the positions of the folder it continues.
pub fn config_of(run: &ModelConfig, source: &ModelSource) -> Result<ModelConfig> {
    let ModelSource::Folder(folder) = source else { return Ok(run.clone()) };
    run.continued_from(&read_model_config(folder)?)
        .map_err(|difference| Fault::user(difference.told(&folder.join(CONFIG_FILE))))
}

/// Refuses a reward model where a policy is wanted.
pub fn require_policy(source: &ModelSource) -> Result<()> {
    match source {
        ModelSource::Folder(folder) if folder.join(REWARD_FILE).exists() => {
            Err(Fault::user(format!(
                "{}: a reward model and no policy (it has a {REWARD_FILE}); name another folder",
                folder.display()
            )))
        }
        _ => Ok(()),
    }
}

impl Resident {
    /// Loads or initialises a model; a folder was compared with its manifest. A scalar head is zero if the source has none.
    pub(super) fn load(
        kernels: &dyn Kernels,
        role: &Role,
        model: Transformer,
        source: &ModelSource,
        seed: u64,
        transfers: &Arc<Transfers>,
    ) -> Result<Resident> {
        let (config, name) = (&model.config, role.name());
        let mut params =
            Params::new(kernels, model.layout.clone(), &name).map_err(out_of_memory)?;
        let mut calibration = Calibration::default();
        match source {
            ModelSource::Fresh => params.initialize(kernels, seed, config.initializer_range),
            ModelSource::Folder(folder) => {
                load_weights(kernels, config, &mut params, folder)?;
                calibration = read_calibration(folder)?.unwrap_or_default();
            }
        }
        let owner = kernels.arena().owner(&name, Kind::Weights);
        let file = format!("{}.weights", name.replace(' ', "-"));
        let weights = Parked::new(transfers, format!("{name}/weights"), owner, &file, params.slab);
        Ok(Resident { model, weights, calibration })
    }

    /// Takes the weights out to be read; put them back with `Parked::put`.
    pub fn take(&mut self, kernels: &dyn Kernels) -> Result<(Params, u64)> {
        let (slab, bytes) = self.weights.take(kernels.arena())?;
        Ok((Params { layout: self.model.layout.clone(), slab }, bytes))
    }

    /// Takes the weights out to be changed; put them back with `Parked::put_changed`.
    pub fn take_to_change(&mut self, kernels: &dyn Kernels) -> Result<Params> {
        let (slab, _) = self.weights.take_to_change(kernels.arena())?;
        Ok(Params { layout: self.model.layout.clone(), slab })
    }
}

/// Fills `params` from the tensors of `folder`; a scalar head that is not there stays zero.
fn load_weights(
    kernels: &dyn Kernels,
    config: &ModelConfig,
    params: &mut Params,
    folder: &Path,
) -> Result<()> {
    let tensors = TensorFolder::open_checked(folder)?;
    // The folder has all of the model, also where this rank has a part of it.
    check_weights(&Layout::new(config, params.layout.has_value_head), &tensors, folder)?;
    params.load(kernels, |spec| match tensors.shape(&spec.name) {
        Some(_) => tensors.read_f32_range(&spec.name, spec.elements()),
        None => Ok(vec![0.0; spec.rows * spec.cols]),
    })
}

/// Refuses weights that are not those of `layout`: every tensor must be there in its shape, and none too many. The
/// scalar head alone may be missing, or left over.
pub fn check_weights(layout: &Layout, tensors: &TensorFolder, folder: &Path) -> Result<()> {
    const HEAD: &str = "score.weight";
    let fault = |text: String| Err(Fault::user(format!("{}: {text}", folder.display())));
    let known: HashSet<&str> = layout.specs.iter().map(|spec| spec.name.as_str()).collect();
    let extra = |name: &&String| *name != HEAD && !known.contains(name.as_str());
    if let Some(extra) = tensors.names().iter().find(extra) {
        let wanted = layout.specs.len();
        return fault(format!(
            "tensor {extra} is not in a model of this config, which has {wanted} tensors; check [model] against the weights"
        ));
    }
    for spec in layout.specs.iter() {
        match tensors.shape(&spec.name) {
            Some(shape) if shape != spec.shape() => {
                return fault(format!(
                    "tensor {} has shape {shape:?}, the config wants {:?}; check [model] against the weights",
                    spec.name,
                    spec.shape()
                ));
            }
            None if spec.name != HEAD => {
                return fault(format!("tensor {} is missing", spec.name));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A reward model's calibration; `None` if the folder has none.
pub fn read_calibration(folder: &Path) -> Result<Option<Calibration>> {
    let path = folder.join(REWARD_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let fault = |reason: String| Fault::user(format!("{}: {reason}", path.display()));
    let text =
        read_limited_text(&path, REWARD_LIMIT).map_err(|unread| fault(unread.to_string()))?;
    let calibration: Calibration = serde_json::from_str(&text).map_err(|e| fault(e.to_string()))?;
    if calibration.deviation <= 0.0 {
        return Err(fault(format!(
            "deviation = {} must be above 0; fit the reward model again",
            calibration.deviation
        )));
    }
    Ok(Some(calibration))
}

/// Writes a reward model's calibration.
pub fn write_calibration(folder: &Path, calibration: Calibration) -> Result<()> {
    let text = serde_json::to_string_pretty(&calibration).expect("two numbers are JSON");
    let path = folder.join(REWARD_FILE);
    std::fs::write(&path, text).map_err(|e| disk_fault("write", &path, e))
}

/// A pass that ended early, as the fault that ends a run.
pub fn interrupted(error: PassError) -> anyhow::Error {
    match error {
        PassError::Memory(error) => out_of_memory(error),
        PassError::Ranks(broken) => anyhow::Error::new(broken),
    }
}

/// A lack of memory as the fault that ends with exit code 4.
pub fn out_of_memory(error: rehearsal_kernels::OutOfMemory) -> anyhow::Error {
    Fault::resources(error.to_string())
}
