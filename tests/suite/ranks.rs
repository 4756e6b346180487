//! Training over several ranks is the training of one: gradients, losses and weights, for layouts of all kinds.
//!
//! Ranks are threads here; nothing but the link between them knows.

use super::checkpoints::{Leg, keep, resume};
use super::tiny::{config_dense, config_grouped, documents};
use rehearsal::cluster::layout::Sampling;
use rehearsal::cluster::link::{Call, Frame, Lane};
use rehearsal::cluster::timeline::{Span, overlap};
use rehearsal::cluster::{Board, Broken, Doing, Link, Local, Mesh, Team, Timeline, mesh::Load};
use rehearsal::config::ModelConfig;
use rehearsal::config::cluster::PipelineSchedule::{self, *};
use rehearsal::config::engine::AttentionForm;
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::OptimizerConfig;
use rehearsal::data::example::{Pair, Sequence};
use rehearsal::model::{Gradients, PackFor, Params, Transformer};
use rehearsal::train::job::StepReport;
use rehearsal::train::pipeline::{Entry, Pass, Schedule};
use rehearsal::train::ranks::{experts_of, part_of};
use rehearsal::train::step::StepSettings;
use rehearsal::train::{Items, Optimizer, Ranks, Trainee, train_step};
use rehearsal_kernels::{Arena, CpuKernels, Kernels, Kind, ReferenceKernels};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A layout of training.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub sizes: [usize; 3],
    pub schedule: PipelineSchedule,
    pub recompute: usize,
    pub is_serial: bool,
}

/// D x P ranks, experts over E of them.
pub fn layout(data: usize, pipeline: usize, expert: usize, schedule: PipelineSchedule) -> Layout {
    Layout { sizes: [data, pipeline, expert], schedule, recompute: 0, is_serial: false }
}

/// What is trained on.
#[derive(Clone)]
pub enum Batch {
    Documents(Vec<Sequence>),
    Pairs(Vec<Pair>),
}

/// What a training gave.
pub struct Outcome {
    /// Rank 0's reports.
    pub reports: Vec<StepReport>,
    /// The summed gradients of its first step, by tensor of the whole model.
    pub gradients: BTreeMap<usize, Vec<f64>>,
    /// Weights after the last step.
    pub weights: BTreeMap<usize, Vec<f64>>,
    /// Bytes of the moments, by rank.
    pub moments: Vec<u64>,
    /// What each rank did in the last step.
    pub spans: Vec<Vec<Span>>,
    /// Bytes that all ranks sent each other.
    pub sent: u64,
}

type Taken = Result<Option<Frame>, Broken>;

/// A link that counts the bytes it sends.
pub struct Counted {
    pub inner: Local,
    pub sent: Arc<AtomicU64>,
}

impl Link for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken> {
        self.sent.fetch_add(frame.bytes.len() as u64, Ordering::Relaxed);
        self.inner.send(to, frame)
    }

    fn take(&self, from: usize, lane: Lane, call: &Call, by: Instant) -> Taken {
        self.inner.take(from, lane, call, by)
    }

    fn board(&self) -> &Arc<Board> {
        self.inner.board()
    }

    fn stop(&self, why: &Broken) {
        self.inner.stop(why);
    }

    fn stopped(&self) -> Option<Broken> {
        self.inner.stopped()
    }
}

/// Six layers, the first one dense, eight experts of four devices.
pub fn model() -> ModelConfig {
    ModelConfig { num_hidden_layers: 6, ..config_grouped() }
}

/// Trains `model` for as many steps as there are batches.
pub fn train(
    model: &ModelConfig,
    layout: Layout,
    in_f64: bool,
    clip: f64,
    batches: &[Batch],
) -> Outcome {
    let all = Leg { steps: 0..batches.len(), from: None, to: None };
    train_leg(model, layout, in_f64, clip, batches, &all)
}

/// The same for some of the steps.
pub fn train_leg(
    model: &ModelConfig,
    layout: Layout,
    in_f64: bool,
    clip: f64,
    batches: &[Batch],
    leg: &Leg,
) -> Outcome {
    let [data, pipeline, _] = layout.sizes;
    let load = Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
    let mesh = Mesh::new(layout.sizes, data * pipeline, load).unwrap();
    let (links, began) = (Local::new(mesh.ranks()), Instant::now());
    let sent = Arc::new(AtomicU64::new(0));
    let count = |inner| Counted { inner, sent: sent.clone() };
    let of_rank =
        |link| Team { is_serial: layout.is_serial, ..team(count(link), mesh, layout.schedule) };
    let ranks: Vec<OfRank> = thread::scope(|scope| {
        let start = |link| {
            let team = of_rank(link);
            scope.spawn(move || {
                let arena = Arena::new(None);
                let kernels: Box<dyn Kernels> = match in_f64 {
                    true => Box::new(ReferenceKernels::new(arena)),
                    false => Box::new(CpuKernels::new(1, arena)),
                };
                let timeline = Arc::new(Timeline::since(began));
                let how = (layout.recompute, clip);
                on_rank(kernels.as_ref(), &team, timeline, model, how, batches, leg)
            })
        };
        let threads: Vec<_> = links.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    Outcome { sent: sent.load(Ordering::Relaxed), ..join(ranks) }
}

/// A rank of a team of threads.
pub fn team(link: impl Link + 'static, mesh: Mesh, schedule: PipelineSchedule) -> Team {
    Team {
        link: Arc::new(link),
        mesh,
        schedule,
        sampling: Sampling { ranks: mesh.ranks(), tensor: 1, expert: 1 },
        deadline: Duration::from_secs(60),
        ..Team::alone()
    }
}

/// What one rank has to tell.
struct OfRank {
    reports: Vec<StepReport>,
    /// Pieces of the gradients that it answers for: tensor, first element, numbers.
    gradients: Vec<(usize, usize, Vec<f64>)>,
    weights: Vec<(usize, Vec<f64>)>,
    moments: u64,
    spans: Vec<Span>,
}

fn on_rank(
    kernels: &dyn Kernels,
    team: &Team,
    timeline: Arc<Timeline>,
    config: &ModelConfig,
    (recompute, clip): (usize, f64),
    batches: &[Batch],
    leg: &Leg,
) -> OfRank {
    let value_head = matches!(batches[0], Batch::Pairs(_));
    let (part, experts) = (part_of(team, config), experts_of(team, &timeline));
    let model = Transformer::of_part(kernels, config, value_head, part, experts).unwrap();
    let ranks = Ranks::new(team, config, &model.layout, timeline.clone());
    let mut params = Params::new(kernels, model.layout.clone(), "policy").unwrap();
    params.initialize(kernels, 3, config.initializer_range);
    let mut gradients = Gradients::new(kernels, &model.layout, "policy").unwrap();
    let mut optimizer = Optimizer::new(kernels, &ranks.zero.own, "policy").unwrap();
    let moments = kernels.arena().held_by(Kind::Moments);
    if let Some(folder) = leg.from {
        resume(kernels, &mut params, &mut optimizer, &ranks.zero.own, folder).unwrap();
        optimizer.step = leg.steps.start as u64;
    }
    let settings = OptimizerConfig {
        learning_rate: 0.01,
        weight_decay: 0.1,
        clip,
        ..OptimizerConfig::default()
    };
    let (mut reports, mut first) = (Vec::new(), Vec::new());
    for (step, batch) in batches.iter().enumerate().take(leg.steps.end).skip(leg.steps.start) {
        let pack = PackFor::documents(AttentionForm::Expanded, true);
        let packed = model.pack(kernels, &params, "policy", step as u64, pack).unwrap();
        let items = match batch {
            Batch::Documents(documents) => Items::Documents(documents),
            Batch::Pairs(pairs) => Items::Pairs(pairs),
        };
        let mut trainee = Trainee {
            kernels,
            model: &model,
            params: &mut params,
            packed: &packed,
            gradients: &mut gradients,
            optimizer: &mut optimizer,
            ranks: &ranks,
        };
        let settings = StepSettings {
            optimizer: &settings,
            step: step as u64,
            steps: batches.len() as u64,
            share: step as f64 / batches.len() as f64,
            balance: Balance { expert: 0.01, device: 0.01, communication: 0.02 },
            dropping: None,
            micro_batch: 1,
            recompute,
        };
        reports.push(train_step(&mut trainee, &settings, &items).unwrap());
        if step == leg.steps.start {
            let piece = |run: &rehearsal::cluster::layout::Run| {
                let number = model.layout.specs[run.tensor].number;
                let values = gradients.slab.run(run.tensor, run.elements.clone());
                (number, run.elements.start, kernels.download_f64(&values))
            };
            first = ranks.zero.own.iter().map(piece).collect();
        }
    }
    if let Some(folder) = leg.to {
        keep(kernels, team, config, &params, &optimizer, &ranks.zero.own, folder).unwrap();
    }
    let whole = |(index, spec): (usize, &rehearsal::model::params::ParamSpec)| {
        (spec.number, kernels.download_f64(&params.slab.tensor(index)))
    };
    let weights = model.layout.specs.iter().enumerate().map(whole).collect();
    OfRank { reports, gradients: first, weights, moments, spans: timeline.take() }
}

/// The whole from its parts; what several ranks hold must be the same bits on all of them.
fn join(ranks: Vec<OfRank>) -> Outcome {
    let mut gradients: BTreeMap<usize, BTreeMap<usize, f64>> = BTreeMap::new();
    let mut weights: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for rank in &ranks {
        for (tensor, first, values) in &rank.gradients {
            let tensor = gradients.entry(*tensor).or_default();
            for (i, value) in values.iter().enumerate() {
                assert!(tensor.insert(first + i, *value).is_none(), "answered for once");
            }
        }
        for (tensor, values) in &rank.weights {
            assert_eq!(weights.entry(*tensor).or_insert_with(|| values.clone()), values);
        }
    }
    for other in &ranks[1..] {
        for (report, first) in other.reports.iter().zip(&ranks[0].reports) {
            let figures = |r: &StepReport| [r.loss, r.gradient_norm].map(f64::to_bits);
            assert_eq!(figures(report), figures(first), "all ranks have the same figures");
        }
    }
    let dense = |(tensor, values): (usize, BTreeMap<usize, f64>)| {
        assert!(values.keys().copied().eq(0..values.len()), "every element is answered for");
        (tensor, values.into_values().collect())
    };
    Outcome {
        gradients: gradients.into_iter().map(dense).collect(),
        weights,
        moments: ranks.iter().map(|rank| rank.moments).collect(),
        spans: ranks.iter().map(|rank| rank.spans.clone()).collect(),
        sent: 0,
        reports: ranks.into_iter().next().unwrap().reports,
    }
}

/// Batches of documents of unequal lengths; the third has fewer documents than some layouts have ranks.
pub fn texts(config: &ModelConfig, steps: usize) -> Vec<Batch> {
    let batch = |step: usize| {
        let count = if step == 2 { 3 } else { 13 };
        let lengths: Vec<usize> = (0..count).map(|i| 4 + (7 * i + 3 * step) % 9).collect();
        let mut documents = documents(config, &lengths);
        documents.rotate_left(step % count);
        Batch::Documents(documents)
    };
    (0..steps).map(batch).collect()
}

/// Largest relative L2 distance of a tensor.
pub fn distance(a: &BTreeMap<usize, Vec<f64>>, b: &BTreeMap<usize, Vec<f64>>) -> f64 {
    assert!(a.keys().eq(b.keys()), "the same tensors");
    let of_tensor = |(a, b): (&Vec<f64>, &Vec<f64>)| {
        assert_eq!(a.len(), b.len());
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let apart = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let size = square(&mut b.iter().copied());
        if size == 0.0 { apart.sqrt() } else { (apart / size).sqrt() }
    };
    a.values().zip(b.values()).map(of_tensor).fold(0.0, f64::max)
}

/// Largest distance of a loss.
pub fn losses_apart(a: &Outcome, b: &Outcome) -> f64 {
    let apart = |(a, b): (&StepReport, &StepReport)| {
        let balance = (a.balance_loss - b.balance_loss).abs();
        (a.loss - b.loss).abs().max(balance)
    };
    a.reports.iter().zip(&b.reports).map(apart).fold(0.0, f64::max)
}

/// A gradient norm that some of the steps have and others have not.
pub const CLIP: f64 = 2.0;

/// Layouts that CI trains in; the proof has more.
pub fn few() -> [Layout; 7] {
    [
        layout(2, 1, 1, OneForwardOneBackward),
        layout(4, 1, 4, OneForwardOneBackward),
        layout(1, 3, 1, OneForwardOneBackward),
        layout(2, 2, 2, ZeroBubbleH1),
        layout(1, 3, 1, ZeroBubbleH2),
        layout(2, 2, 1, ZeroBubbleV),
        Layout { recompute: 1, ..layout(4, 2, 2, ZeroBubbleV) },
    ]
}

#[test]
fn training_over_ranks_is_the_training_of_one() {
    let (model, batches) = (model(), texts(&model(), 20));
    let one = train(&model, layout(1, 1, 1, OneForwardOneBackward), true, CLIP, &batches);
    let norms: Vec<f64> = one.reports.iter().map(|report| report.gradient_norm).collect();
    let clipped = norms.iter().filter(|norm| **norm > CLIP).count();
    assert!((1..20).contains(&clipped), "some steps clip and some do not: {norms:?}");
    for layout in few() {
        let many = train(&model, layout, true, CLIP, &batches);
        let apart = distance(&many.gradients, &one.gradients);
        assert!(apart < 1e-6, "{layout:?}: gradients {apart:e}");
        let apart = losses_apart(&many, &one);
        assert!(apart < 1e-5, "{layout:?}: losses {apart:e}");
        for (many, one) in many.reports.iter().zip(&one.reports) {
            assert_eq!((many.tokens, many.rows), (one.tokens, one.rows));
            assert_eq!(many.routing.len(), 5, "every MoE layer tells what its router did");
            let late = layout.sizes[1] > 1 && one.gradient_norm > CLIP;
            assert_eq!(many.was_taken_back, late, "{layout:?}");
        }
    }
}

#[test]
fn in_single_precision_the_losses_stay_together() {
    let (model, batches) = (model(), texts(&model(), 20));
    let one = train(&model, layout(1, 1, 1, OneForwardOneBackward), false, 1.0, &batches);
    for layout in [layout(2, 1, 2, OneForwardOneBackward), layout(2, 3, 1, ZeroBubbleV)] {
        let many = train(&model, layout, false, 1.0, &batches);
        let apart = distance(&many.gradients, &one.gradients);
        assert!(apart < 1e-5, "{layout:?}: gradients {apart:e}");
        let apart = losses_apart(&many, &one);
        assert!(apart < 1e-3, "{layout:?}: losses {apart:e}");
    }
}

#[test]
fn each_rank_has_its_share_of_the_moments() {
    let (model, batches) = (model(), texts(&model(), 1));
    let one = train(&model, layout(1, 1, 1, OneForwardOneBackward), true, 1.0, &batches);
    let all = one.moments[0];
    for (data, pipeline, expert) in [(4, 1, 1), (4, 1, 2), (2, 3, 2)] {
        let layout = layout(data, pipeline, expert, ZeroBubbleH1);
        let many = train(&model, layout, true, 1.0, &batches);
        let sum: u64 = many.moments.iter().sum();
        if (pipeline, expert) == (1, 1) {
            // Gradients go to who answers for them, and weights come back: each number twice, to all but its own rank.
            let numbers = (data as u64 - 1) * all;
            let tenth = numbers / 10;
            assert!(many.sent.abs_diff(numbers) < tenth, "{} of {numbers}", many.sent);
        }
        // Each moment lives once; arenas round what they give.
        assert!(sum >= all && sum < all + (64 << 10), "{layout:?}: {sum} of {all}");
        for stage in many.moments.chunks(data) {
            let (least, most) = (stage.iter().min().unwrap(), stage.iter().max().unwrap());
            assert!(most - least <= 16 << 10, "{layout:?}: {:?}", many.moments);
        }
    }
}

#[test]
fn what_is_computed_again_and_what_waits_changes_no_bit() {
    let (model, batches) = (model(), texts(&model(), 3));
    let plain = layout(2, 2, 2, ZeroBubbleH1);
    let kept = train(&model, plain, false, 1.0, &batches);
    for other in [
        Layout { recompute: 2, ..plain },
        Layout { is_serial: true, ..plain },
        Layout { schedule: OneForwardOneBackward, ..plain },
        Layout { schedule: ZeroBubbleH2, ..plain },
    ] {
        let is_less = other.recompute > 0;
        let other = train(&model, other, false, 1.0, &batches);
        let most = |outcome: &Outcome| outcome.reports[2].memory_high_water;
        assert!(!is_less || most(&other) < most(&kept), "{} of {}", most(&other), most(&kept));
        assert!(other.weights == kept.weights && other.gradients == kept.gradients);
    }
}

#[test]
fn shared_experts_are_computed_while_tokens_are_under_way_unless_that_is_forbidden() {
    let (model, batches) = (model(), texts(&model(), 2));
    let plain = layout(2, 1, 2, OneForwardOneBackward);
    let share = |layout| {
        let spans = train(&model, layout, false, 1.0, &batches).spans;
        spans
            .iter()
            .map(|spans| overlap(spans, Doing::AllToAll, Doing::SharedExperts).unwrap())
            .collect::<Vec<f64>>()
    };
    assert!(share(plain).iter().all(|share| *share > 0.0), "{:?}", share(plain));
    let serial = share(Layout { is_serial: true, ..plain });
    assert!(serial.iter().all(|share| *share == 0.0), "{serial:?}");
}

#[test]
fn a_stage_does_what_its_schedule_says_and_nothing_before_what_it_waits_for() {
    let (model, batches) = (model(), texts(&model(), 1));
    for schedule in [OneForwardOneBackward, ZeroBubbleH1, ZeroBubbleH2, ZeroBubbleV] {
        let ran = train(&model, layout(1, 3, 1, schedule), false, 1.0, &batches);
        let micro_batches =
            ran.spans[0].iter().filter(|s| matches!(s.doing, Doing::Forward(_, 0))).count();
        let planned = Schedule::new(schedule, 3, micro_batches).unwrap();
        let entry = |span: &Span| {
            let (pass, micro_batch, chunk) = match span.doing {
                Doing::Forward(batch, chunk) => (Pass::Forward, batch, chunk),
                Doing::BackwardInput(batch, chunk) => (Pass::BackwardInput, batch, chunk),
                Doing::BackwardWeight(batch, chunk) => (Pass::BackwardWeight, batch, chunk),
                _ => return None,
            };
            Some(Entry { pass, micro_batch: micro_batch as usize, chunk: chunk as usize })
        };
        // The clocks of the ranks began together.
        let mut ends = BTreeMap::new();
        for (stage, spans) in ran.spans.iter().enumerate() {
            let entries: Vec<Entry> = spans.iter().filter_map(entry).collect();
            assert_eq!(entries, planned.stages[stage], "{schedule:?} stage {stage}");
            ends.extend(spans.iter().filter_map(|s| Some(((stage, entry(s)?), (s.start, s.end)))));
        }
        for ((stage, entry), (start, _)) in &ends {
            for (other, mut before) in planned.waits_for(*stage, *entry) {
                // Where the backward pass is one, all of it is written down as the input gradients'.
                if schedule == OneForwardOneBackward && before.pass == Pass::BackwardWeight {
                    before.pass = Pass::BackwardInput;
                }
                let before = (other, before);
                assert!(
                    ends[&before].1 <= *start,
                    "{schedule:?}: {before:?} before {stage} {entry:?}"
                );
            }
        }
    }
}

#[test]
fn a_reward_model_and_a_dense_model_with_one_matrix_for_both_ends_train_over_ranks_too() {
    let mut dense = ModelConfig { num_hidden_layers: 4, ..config_dense() };
    dense.tie_word_embeddings = true;
    let pairs = |step: usize| {
        let texts = documents(&dense, &[5, 7, 4, 9, 6, 6, 8, 5, 7, 4]);
        let pair = |pair: &[Sequence]| Pair {
            chosen: pair[0].tokens.clone(),
            rejected: pair[1].tokens.clone(),
        };
        let mut pairs: Vec<Pair> = texts.chunks(2).map(pair).collect();
        pairs.rotate_left(step);
        Batch::Pairs(pairs)
    };
    let pairs: Vec<Batch> = (0..4).map(pairs).collect();
    for batches in [pairs, texts(&dense, 4)] {
        let one = train(&dense, layout(1, 1, 1, OneForwardOneBackward), true, CLIP, &batches);
        for (data, pipeline, schedule) in
            [(3, 1, ZeroBubbleH1), (2, 2, ZeroBubbleH1), (2, 2, ZeroBubbleV)]
        {
            let layout = layout(data, pipeline, 1, schedule);
            let many = train(&dense, layout, true, CLIP, &batches);
            let apart = [distance(&many.gradients, &one.gradients), losses_apart(&many, &one)];
            assert!(apart[0] < 1e-6 && apart[1] < 1e-5, "{layout:?}: {apart:?}");
            let accuracy = |outcome: &Outcome| outcome.reports[3].accuracy;
            assert_eq!(accuracy(&many), accuracy(&one));
        }
    }
}
