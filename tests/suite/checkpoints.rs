//! Checkpoints know no layout: what ranks of one layout save, ranks of any other go on from.
//!
//! Ranks are threads here; nothing but the link between them knows.

use super::ranks::{Batch, CLIP, Layout, Outcome, distance, layout, model, team, texts};
use super::ranks::{losses_apart, train, train_leg};
use super::tiny::config_dense;
use proptest::prelude::*;
use rehearsal::checkpoint::TensorFolder;
use rehearsal::cluster::layout::Run;
use rehearsal::cluster::mesh::Load;
use rehearsal::cluster::{Local, Mesh, Team, Timeline};
use rehearsal::config::ModelConfig;
use rehearsal::config::cluster::PipelineSchedule::*;
use rehearsal::engine::SavedState;
use rehearsal::engine::policy_files::{
    Moments, MomentsMut, join_shards, read_policy, world, write_policy,
};
use rehearsal::model::{self, Params, Transformer};
use rehearsal::train::ranks::part_of;
use rehearsal::train::{Optimizer, Ranks};
use rehearsal_kernels::{Arena, CpuKernels, Kernels};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;
use tempfile::TempDir;

/// Runs `work` on every rank of a layout; the results in order of the ranks.
pub fn on_ranks<T: Send>(
    config: &ModelConfig,
    layout: Layout,
    work: impl Fn(&Team) -> T + Sync,
) -> Vec<T> {
    let [data, pipeline, _] = layout.sizes;
    let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
    let mesh = Mesh::new(layout.sizes, data * pipeline, load).unwrap();
    thread::scope(|scope| {
        let start = |link| {
            let (team, work) = (team(link, mesh, layout.schedule), &work);
            scope.spawn(move || work(&team))
        };
        let threads: Vec<_> = Local::new(mesh.ranks()).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A rank's part of a policy that is in training.
pub struct OfRank {
    kernels: CpuKernels,
    params: Params,
    optimizer: Optimizer,
    own: Vec<Run>,
}

impl OfRank {
    pub fn new(config: &ModelConfig, team: &Team, value_head: bool) -> OfRank {
        let kernels = CpuKernels::new(1, Arena::new(None));
        let part = part_of(team, config);
        let model = Transformer::of_part(&kernels, config, value_head, part, None).unwrap();
        let timeline = Arc::new(Timeline::since(Instant::now()));
        let own = Ranks::new(team, config, &model.layout, timeline).zero.own;
        let params = Params::new(&kernels, model.layout.clone(), "policy").unwrap();
        let optimizer = Optimizer::new(&kernels, &own, "policy").unwrap();
        OfRank { kernels, params, optimizer, own }
    }

    /// Gives every element of weights and moments its own value, the same in every layout.
    pub fn fill(&mut self, seed: usize) {
        self.optimizer.step = seed as u64;
        let specs = &self.params.layout.specs;
        for (index, spec) in specs.iter().enumerate() {
            let values = values(seed, spec.number, 0..spec.rows * spec.cols);
            self.kernels.upload(&values, &mut self.params.slab.tensor_mut(index));
        }
        for (place, run) in self.own.iter().enumerate() {
            let Optimizer { first, second, .. } = &mut self.optimizer;
            for (kind, slab) in [first, second].into_iter().enumerate() {
                let number = specs[run.tensor].number;
                let values = values(seed + 1 + kind, number, run.elements.clone());
                self.kernels.upload(&values, &mut slab.tensor_mut(place));
            }
        }
    }

    /// Whether all of it is as `fill` leaves it, to the bit.
    fn is_filled(&self, seed: usize) -> bool {
        let specs = &self.params.layout.specs;
        let weights = specs.iter().enumerate().all(|(index, spec)| {
            let values = values(seed, spec.number, 0..spec.rows * spec.cols);
            same(&self.kernels.download(&self.params.slab.tensor(index)), &values)
        });
        let moments = self.own.iter().enumerate().all(|(place, run)| {
            let number = specs[run.tensor].number;
            let slabs = [&self.optimizer.first, &self.optimizer.second];
            slabs.into_iter().enumerate().all(|(kind, slab)| {
                let values = values(seed + 1 + kind, number, run.elements.clone());
                same(&self.kernels.download(&slab.tensor(place)), &values)
            })
        });
        weights && moments
    }

    pub fn save(
        &self,
        config: &ModelConfig,
        team: &Team,
        folder: &Path,
    ) -> anyhow::Result<SavedState> {
        let OfRank { kernels, params, optimizer, own } = self;
        keep(kernels, team, config, params, optimizer, own, folder)
    }

    pub fn restore(&mut self, folder: &Path) -> anyhow::Result<()> {
        resume(&self.kernels, &mut self.params, &mut self.optimizer, &self.own, folder)
    }
}

/// Some steps of a training, between two saves.
#[derive(Clone)]
pub struct Leg<'a> {
    /// Which steps.
    pub steps: Range<usize>,
    /// Where it goes on from.
    pub from: Option<&'a Path>,
    /// Where it is saved at the end.
    pub to: Option<&'a Path>,
}

/// Saves with all other ranks.
pub fn keep(
    kernels: &dyn Kernels,
    team: &Team,
    config: &ModelConfig,
    params: &Params,
    optimizer: &Optimizer,
    own: &[Run],
    folder: &Path,
) -> anyhow::Result<SavedState> {
    let Optimizer { first, second, step } = optimizer;
    let moments = Some(Moments { own, first, second });
    let saved = SavedState { policy_version: *step, optimizer_step: *step };
    let written = write_policy(kernels, team, config, params, moments, saved, folder);
    let whole = model::Layout::new(config, params.layout.has_value_head);
    join_shards(&world(team, &whole), &whole, written, folder)
}

/// Brings back what this rank holds and answers for.
pub fn resume(
    kernels: &dyn Kernels,
    params: &mut Params,
    optimizer: &mut Optimizer,
    own: &[Run],
    folder: &Path,
) -> anyhow::Result<()> {
    let Optimizer { first, second, .. } = optimizer;
    read_policy(kernels, params, Some(MomentsMut { own, first, second }), folder)
}

fn values(seed: usize, tensor: usize, elements: Range<usize>) -> Vec<f32> {
    let value = |element: usize| {
        let mixed = (seed * 1_000_003 + tensor * 7919 + element).wrapping_mul(2_654_435_761);
        (mixed % 65_521) as f32 * 0.001 - 30.0
    };
    elements.map(value).collect()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Saves from a layout: step `step`, every element with its own value.
pub fn save(config: &ModelConfig, from: Layout, value_head: bool, step: u64, folder: &Path) {
    on_ranks(config, from, |team| {
        let mut rank = OfRank::new(config, team, value_head);
        rank.fill(step as usize);
        rank.save(config, team, folder).unwrap();
    });
}

/// Layouts for a model of six layers and eight experts.
fn layouts() -> impl Strategy<Value = Layout> {
    let schedules = prop_oneof![Just(OneForwardOneBackward), Just(ZeroBubbleH1), Just(ZeroBubbleV)];
    (1usize..4, 0u32..3, 1usize..4, schedules).prop_map(|(groups, power, pipeline, schedule)| {
        let expert = 1 << power;
        layout(groups * expert, pipeline, expert, schedule)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn weights_and_moments_come_back_to_the_bit_in_any_other_layout(
        from in layouts(), to in layouts(), has_experts in any::<bool>(), tied in any::<bool>(),
        value_head in any::<bool>(),
    ) {
        let dense = ModelConfig { num_hidden_layers: 6, ..config_dense() };
        let config = ModelConfig {
            tie_word_embeddings: tied,
            ..if has_experts { model() } else { dense }
        };
        let one_group = |layout: Layout| match has_experts {
            true => layout,
            false => Layout { sizes: [layout.sizes[0], layout.sizes[1], 1], ..layout },
        };
        let folder = TempDir::new().unwrap();
        save(&config, one_group(from), value_head, 5, folder.path());
        let back = on_ranks(&config, one_group(to), |team| {
            let mut rank = OfRank::new(&config, team, value_head);
            rank.restore(folder.path()).unwrap();
            rank.is_filled(5)
        });
        prop_assert!(back.into_iter().all(|is_filled| is_filled), "{from:?} to {to:?}");
    }
}

#[test]
fn each_rank_writes_as_much_as_the_others_that_hold_the_same() {
    let (config, folder) = (model(), TempDir::new().unwrap());
    save(&config, layout(4, 1, 2, OneForwardOneBackward), false, 1, folder.path());
    let bytes = |stem: &str| -> Vec<u64> {
        let files = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap());
        let is_shard = |name: &str| name.starts_with(stem) && name.ends_with(".safetensors");
        files
            .filter(|file| is_shard(file.file_name().to_str().unwrap()))
            .map(|file| file.metadata().unwrap().len())
            .collect()
    };
    for (stem, copies) in [("model-", 1), ("optimizer-", 2)] {
        let bytes = bytes(stem);
        let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        assert_eq!(bytes.len(), 4, "{stem}");
        // Headers and the largest tensor make the difference.
        assert!(most - least < copies * (24 << 10) && 2 * least > *most, "{stem}: {bytes:?}");
    }
    let whole = TensorFolder::open(folder.path()).unwrap();
    let elements = model::Layout::new(&config, false).elements() as u64;
    assert_eq!(whole.elements(), elements, "every weight once, and no moment");
}

#[test]
fn what_many_ranks_save_and_one_rank_saves_again_has_the_bytes_of_one_rank_alone() {
    let (config, one) = (model(), layout(1, 1, 1, OneForwardOneBackward));
    let folders = [(); 3].map(|()| TempDir::new().unwrap());
    let [alone, many, again] = [0, 1, 2].map(|i| folders[i].path());
    save(&config, one, false, 9, alone);
    save(&config, layout(2, 2, 2, ZeroBubbleV), false, 9, many);
    on_ranks(&config, one, |team| {
        let mut rank = OfRank::new(&config, team, false);
        rank.restore(many).unwrap();
        rank.save(&config, team, again).unwrap();
    });
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert!(bytes(alone) == bytes(again), "{file}");
        assert!(!many.join(file).exists(), "many ranks write shards");
    }
}

/// Trains half of the steps in one layout and half in another; the whole as one outcome.
pub fn train_over(from: Layout, to: Layout, in_f64: bool, clip: f64, batches: &[Batch]) -> Outcome {
    let (folder, half) = (TempDir::new().unwrap(), batches.len() / 2);
    let first = Leg { steps: 0..half, from: None, to: Some(folder.path()) };
    let second = Leg { steps: half..batches.len(), from: Some(folder.path()), to: None };
    let first = train_leg(&model(), from, in_f64, clip, batches, &first);
    let mut whole = train_leg(&model(), to, in_f64, clip, batches, &second);
    whole.reports.splice(0..0, first.reports);
    whole.gradients = first.gradients;
    whole
}

/// Pairs of layouts that CI goes through; the proof has more.
fn few_pairs() -> [(Layout, Layout); 6] {
    let one = layout(1, 1, 1, OneForwardOneBackward);
    [
        (one, layout(2, 2, 2, ZeroBubbleV)),
        (layout(4, 1, 4, OneForwardOneBackward), one),
        (layout(2, 1, 1, OneForwardOneBackward), layout(1, 3, 1, ZeroBubbleV)),
        (layout(1, 3, 1, ZeroBubbleV), layout(1, 3, 1, ZeroBubbleH1)),
        (layout(4, 1, 2, OneForwardOneBackward), layout(4, 1, 4, OneForwardOneBackward)),
        (layout(2, 2, 1, ZeroBubbleH1), layout(3, 1, 1, OneForwardOneBackward)),
    ]
}

#[test]
fn a_training_goes_on_in_another_layout_with_the_losses_of_one_that_never_stopped() {
    let (one, batches) = (layout(1, 1, 1, OneForwardOneBackward), texts(&model(), 20));
    let straight = train(&model(), one, true, CLIP, &batches);
    for (from, to) in few_pairs() {
        let resumed = train_over(from, to, true, CLIP, &batches);
        assert_eq!(resumed.reports.len(), 20);
        assert_eq!(resumed.sent > 0, to.sizes != [1, 1, 1], "one rank has nobody to send to");
        let apart =
            [losses_apart(&resumed, &straight), distance(&resumed.weights, &straight.weights)];
        assert!(apart[0] < 1e-5, "{from:?} to {to:?}: losses {:e}", apart[0]);
        assert!(apart[1] < 1e-5, "{from:?} to {to:?}: weights {:e}", apart[1]);
    }
}

#[test]
fn in_single_precision_too() {
    let (one, batches) = (layout(1, 1, 1, OneForwardOneBackward), texts(&model(), 20));
    let straight = train(&model(), one, false, 1.0, &batches);
    let (from, to) = few_pairs()[0];
    let apart = losses_apart(&train_over(from, to, false, 1.0, &batches), &straight);
    assert!(apart < 1e-3, "{apart:e}");
    // In one layout a save changes no bit of what follows.
    let kept = train(&model(), from, false, 1.0, &batches);
    assert!(train_over(from, from, false, 1.0, &batches).weights == kept.weights);
}
