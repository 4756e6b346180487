//! The files of a policy: which of its weights and moments a rank writes, and which it reads.
//!
//! A rank alone writes `model.safetensors` and `optimizer.safetensors`. Of many ranks each writes shards of them, all at
//! once: a tensor by one of those that hold it, moments by who answers for them, as pieces that say where they belong.
//! Nothing in the folder depends on the layout that wrote it: whoever reads takes the tensors that it holds and the
//! runs of moments that it answers for, from whichever files have them.

use super::hybrid::SavedState;
use crate::checkpoint::shards::{shard_name, spread, write_index, write_written};
use crate::checkpoint::tensors::{MODEL_FILE, OPTIMIZER_FILE};
use crate::checkpoint::{
    Pieces, Shard, TensorEntry, TensorFolder, piece_name, write_shard, write_tensors,
};
use crate::cluster::layout::Run;
use crate::cluster::{Group, Team};
use crate::config::ModelConfig;
use crate::config::failpoint::failpoint;
use crate::model::{Layout, Params, placement};
use anyhow::{Context, Result, bail, ensure};
use rehearsal_kernels::{Kernels, Slab};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Bytes of its share that the slowest rank reads or writes in a second: others wait so much longer than for a call.
const SLOWEST: u64 = 16 << 20;

/// What a rank has written, as it tells the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Where the training stood.
    pub saved: SavedState,
    /// The name of the save that its shards carry.
    save: String,
    /// Its shard of the weights, of many ranks'.
    weights: Option<Shard>,
    /// Its shard of the moments, of many ranks'.
    moments: Option<Shard>,
}

/// The moments that a rank answers for.
pub struct Moments<'a> {
    /// Of which elements, in order of the slabs' tensors.
    pub own: &'a [Run],
    /// The first moments.
    pub first: &'a Slab,
    /// The second moments.
    pub second: &'a Slab,
}

/// The same, to be read into.
pub struct MomentsMut<'a> {
    /// Of which elements, in order of the slabs' tensors.
    pub own: &'a [Run],
    /// The first moments.
    pub first: &'a mut Slab,
    /// The second moments.
    pub second: &'a mut Slab,
}

/// The ranks that save or restore together with this one, with the time that they may need to write or read a model of
/// this layout.
pub fn world(team: &Team, whole: &Layout) -> Group {
    // Weights and two moments, in parts of about the same size.
    let bytes = 3 * (whole.elements() * size_of::<f32>()) as u64;
    let share = bytes / team.peers().len() as u64;
    let deadline = team.deadline + Duration::from_secs(share / SLOWEST);
    Group::new(team.link.clone(), team.peers().collect(), deadline)
}

/// Writes what is this rank's to write, and forces it to the disk.
pub fn write_policy(
    kernels: &dyn Kernels,
    team: &Team,
    config: &ModelConfig,
    params: &Params,
    moments: Option<Moments>,
    saved: SavedState,
    folder: &Path,
) -> Result<Written> {
    let place = Destination { folder, team, save: name_of(&saved, team) };
    let weights = write_weights(kernels, &place, config, params)?;
    let moments = match moments {
        Some(moments) => write_moments(kernels, &place, &params.layout, moments)?,
        None => None,
    };
    failpoint("checkpoint-own-written");
    Ok(Written { saved, save: place.save, weights, moments })
}

/// Makes one model of what many ranks wrote, or fails on all of them. Then the folder wants a manifest and nothing else.
pub fn join_shards(
    world: &Group,
    whole: &Layout,
    written: Result<Written>,
    folder: &Path,
) -> Result<SavedState> {
    if world.ranks().len() == 1 {
        return written.map(|written| written.saved);
    }
    let told = written.map(|written| serde_json::to_vec(&written).expect("plain values"));
    let all = world.agree("shards of a checkpoint", told)?;
    let all = all.iter().map(|told| Ok(serde_json::from_slice(told)?));
    let all: Vec<Written> = all.collect::<Result<_>>().context("what a rank wrote")?;
    // Who has the rest to do is one rank; nobody goes on before it is done.
    let indexed = if world.own() == 0 { write_indices(&all, whole, folder) } else { Ok(()) };
    world.agree("index of a checkpoint", indexed.map(|()| Vec::new()))?;
    Ok(all[world.own()].saved)
}

/// Reads what a rank holds and answers for out of a folder that was compared with its manifest.
pub fn read_policy(
    kernels: &dyn Kernels,
    params: &mut Params,
    moments: Option<MomentsMut>,
    folder: &Path,
) -> Result<()> {
    let tensors = TensorFolder::open_checked(folder)?;
    params.load(kernels, |spec| tensors.read_f32_range(&spec.name, spec.elements()))?;
    let Some(MomentsMut { own, first, second }) = moments else { return Ok(()) };
    let pieces = Pieces::open(folder, OPTIMIZER_FILE)?;
    for (prefix, slab) in [("m.", first), ("v.", second)] {
        for (place, Run { tensor, elements }) in own.iter().enumerate() {
            let spec = &params.layout.specs[*tensor];
            let (name, count) = (format!("{prefix}{}", spec.name), spec.rows * spec.cols);
            pieces.read(&name, count, elements.clone(), &mut |first, values| {
                kernels.upload(values, &mut slab.run_mut(place, first..first + values.len()));
            })?;
        }
    }
    Ok(())
}

/// Where a rank writes to.
struct Destination<'a> {
    folder: &'a Path,
    team: &'a Team,
    /// The name of the save.
    save: String,
}

impl Destination<'_> {
    /// Writes this rank's tensors; `number` is its shard's among so many. A rank alone writes `whole`.
    fn write(
        &self,
        whole: &str,
        (number, of): (usize, usize),
        entries: &[TensorEntry],
        fetch: &mut dyn FnMut(usize) -> Vec<f32>,
    ) -> Result<Option<Shard>> {
        let fetch = &mut |index| Ok(fetch(index));
        if self.team.is_alone() {
            return write_tensors(&self.folder.join(whole), entries, fetch).map(|()| None);
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let file = shard_name(whole, number, of);
        let record = write_shard(&self.folder.join(&file), entries, &self.save, fetch)?;
        let bytes = |entry: &TensorEntry| 4 * entry.shape.iter().product::<usize>() as u64;
        let tensors = entries.iter().map(|entry| (entry.name.clone(), bytes(entry))).collect();
        Ok(Some(Shard { file, record, tensors }))
    }
}

/// What tells the files of one save from those of another.
fn name_of(saved: &SavedState, team: &Team) -> String {
    let SavedState { policy_version, optimizer_step } = saved;
    let mesh = &team.mesh;
    let (data, pipeline, expert) = (mesh.data(), mesh.pipeline(), mesh.expert());
    format!(
        "policy version {policy_version}, optimizer step {optimizer_step}, {data} x {pipeline} ranks \
         with experts over {expert}"
    )
}

/// Writes the tensors that are this rank's to write.
fn write_weights(
    kernels: &dyn Kernels,
    place: &Destination,
    config: &ModelConfig,
    params: &Params,
) -> Result<Option<Shard>> {
    let (layout, team) = (&params.layout, place.team);
    let writers = writers(config, layout.has_value_head, team);
    let mut ranks = writers.clone();
    ranks.sort_unstable();
    ranks.dedup();
    let own: Vec<usize> = (0..layout.specs.len())
        .filter(|index| writers[layout.specs[*index].number] == team.rank())
        .collect();
    let entry = |index: &usize| TensorEntry {
        name: layout.specs[*index].name.clone(),
        shape: layout.specs[*index].shape(),
    };
    let entries: Vec<TensorEntry> = own.iter().map(entry).collect();
    let number = ranks.iter().position(|rank| *rank == team.rank()).unwrap_or(ranks.len());
    place.write(MODEL_FILE, (number, ranks.len()), &entries, &mut |index| {
        kernels.download(&params.slab.tensor(own[index]))
    })
}

/// Who writes each tensor of a whole model.
fn writers(config: &ModelConfig, value_head: bool, team: &Team) -> Vec<usize> {
    let tensors = placement::of_model(config, value_head);
    let layout = team.layout(config.num_hidden_layers);
    let ranks = team.mesh.ranks();
    let holders = |tensor| (0..ranks).filter(|rank| layout.holds(*rank, tensor)).collect();
    let work: Vec<(u64, Vec<usize>)> = tensors
        .iter()
        .map(|tensor| ((tensor.rows * tensor.cols) as u64, holders(tensor)))
        .collect();
    spread(&work, ranks)
}

/// Writes the moments that this rank answers for; a run of all of a tensor under its name, any other as a piece.
fn write_moments(
    kernels: &dyn Kernels,
    place: &Destination,
    layout: &Layout,
    Moments { own, first, second }: Moments,
) -> Result<Option<Shard>> {
    let slabs = [first, second];
    let entry = |prefix: &'static str| {
        move |run: &Run| {
            let spec = &layout.specs[run.tensor];
            let name = format!("{prefix}{}", spec.name);
            match run.elements.len() == spec.rows * spec.cols {
                true => TensorEntry { name, shape: spec.shape() },
                false => TensorEntry {
                    name: piece_name(&name, run.elements.start),
                    shape: vec![run.elements.len()],
                },
            }
        }
    };
    let entries: Vec<TensorEntry> =
        own.iter().map(entry("m.")).chain(own.iter().map(entry("v."))).collect();
    let number = (place.team.rank(), place.team.mesh.ranks());
    place.write(OPTIMIZER_FILE, number, &entries, &mut |index| {
        kernels.download(&slabs[index / own.len()].tensor(index % own.len()))
    })
}

/// Writes the indices, and what the commit has to know of the shards.
fn write_indices(all: &[Written], whole: &Layout, folder: &Path) -> Result<()> {
    let save = &all[0].save;
    if let Some((rank, other)) = all.iter().enumerate().find(|(_, other)| other.save != *save) {
        bail!("rank {rank} has saved {}, rank 0 {save}", other.save);
    }
    let weights: Vec<&Shard> = all.iter().filter_map(|written| written.weights.as_ref()).collect();
    let moments: Vec<&Shard> = all.iter().filter_map(|written| written.moments.as_ref()).collect();
    let is_there = |name: &String| weights.iter().any(|shard| shard.tensors.contains_key(name));
    if let Some(missing) = whole.specs.iter().map(|spec| &spec.name).find(|name| !is_there(name)) {
        bail!("no rank has written {missing}");
    }
    write_index(folder, MODEL_FILE, &weights, save)?;
    if !moments.is_empty() {
        let held: u64 = moments.iter().flat_map(|shard| shard.tensors.values()).sum();
        let all = 2 * (whole.elements() * size_of::<f32>()) as u64;
        ensure!(held == all, "ranks have written {held} bytes of moments; the model has {all}");
        write_index(folder, OPTIMIZER_FILE, &moments, save)?;
    }
    let shards: Vec<&Shard> = weights.into_iter().chain(moments).collect();
    write_written(folder, &shards)
}
