//! A layer of experts: against plain loops over single experts, its gate, its idle experts.

use crate::tiny::{Tiny, config_grouped, cpu, reference};
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::AttentionForm::Expanded;
use rehearsal::config::routing::Balance;
use rehearsal::data::example::Sequence;
use rehearsal::model::Capacity;
use rehearsal::model::linear::{Linear, Packing};
use rehearsal::model::moe::{Moe, router_spec};
use rehearsal::model::pass::{index_buffer, indices};
use rehearsal::train::Items;
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{Buffer, Kernels, Kind, Store, WeightFormat};

type Rows = Vec<Vec<f64>>;

/// A tensor of the first MoE layer by the end of its published name.
fn tensor(tiny: &Tiny<'_>, name: &str) -> Rows {
    let name = format!("model.layers.1.mlp.{name}.weight");
    let index = tiny.model.layout.specs.iter().position(|spec| spec.name == name).expect(&name);
    let values = tiny.kernels.download_f64(&tiny.params.slab.tensor(index));
    values.chunks(tiny.model.layout.specs[index].cols).map(<[f64]>::to_vec).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `factor` times the FFN of these hidden units: the factor is on the hidden state.
fn ffn(
    tiny: &Tiny<'_>,
    name: &str,
    units: std::ops::Range<usize>,
    factor: f64,
    u: &[f64],
) -> Vec<f64> {
    let [gate, up, down] =
        ["gate_proj", "up_proj", "down_proj"].map(|part| tensor(tiny, &format!("{name}.{part}")));
    let hidden: Vec<f64> = units
        .clone()
        .map(|j| {
            let x = dot(&gate[j], u);
            factor * x / (1.0 + (-x).exp()) * dot(&up[j], u)
        })
        .collect();
    down.iter().map(|row| dot(&row[units.clone()], &hidden)).collect()
}

/// Scores of a token, and the experts it chooses: the best of the groups with the largest maximum.
fn choose(config: &ModelConfig, gate: &Rows, u: &[f64]) -> (Vec<f64>, Vec<usize>) {
    let exps: Vec<f64> = gate.iter().map(|row| dot(row, u).exp()).collect();
    let scores: Vec<f64> = exps.iter().map(|e| e / exps.iter().sum::<f64>()).collect();
    let width = scores.len() / config.n_group;
    let falling = |items: &mut Vec<usize>, value: &dyn Fn(usize) -> f64| {
        items.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
    };
    let mut groups: Vec<usize> = (0..config.n_group).collect();
    falling(&mut groups, &|g| scores[g * width..][..width].iter().copied().fold(0.0, f64::max));
    groups.truncate(config.topk_group);
    let mut experts: Vec<usize> =
        (0..scores.len()).filter(|e| groups.contains(&(e / width))).collect();
    falling(&mut experts, &|e| scores[e]);
    experts.truncate(config.num_experts_per_tok);
    (scores, experts)
}

/// Of one document's (score, token, expert), those that fit on their devices.
fn fitting(
    pairs: &[(f64, usize, usize)],
    config: &ModelConfig,
    factor: f64,
) -> Vec<(usize, usize)> {
    let width = config.n_routed_experts / config.n_group;
    let budget = (factor * pairs.len() as f64 / config.n_group as f64).ceil() as usize;
    let mut kept = Vec::new();
    for device in 0..config.n_group {
        let mut own: Vec<_> = pairs.iter().filter(|pair| pair.2 / width == device).collect();
        own.sort_by(|a, b| b.0.total_cmp(&a.0));
        kept.extend(own.into_iter().take(budget).map(|pair| (pair.1, pair.2)));
    }
    kept
}

/// h + Σ shared FFN + Σ s_i FFN_i with every expert apart, the routed scaling factor on their hidden states; the tokens
/// whose pairs were all dropped.
fn plain_layer(
    tiny: &Tiny<'_>,
    u: &Rows,
    h: &Rows,
    lengths: &[usize],
    factor: Option<(f64, &[u32])>,
) -> (Rows, Vec<usize>) {
    let (config, gate) = (&tiny.model.config, tensor(tiny, "gate"));
    let (m, scale) = (config.moe_intermediate_size, config.routed_scaling_factor);
    let (mut y, mut bare, mut first) = (h.clone(), Vec::new(), 0);
    for (document, length) in lengths.iter().enumerate() {
        let mut pairs = Vec::new();
        for (t, u) in u.iter().enumerate().skip(first).take(*length) {
            let (scores, experts) = choose(config, &gate, u);
            pairs.extend(experts.into_iter().map(|expert| (scores[expert], t, expert)));
        }
        let kept = match factor {
            Some((factor, protected)) if protected[document] == 0 => {
                fitting(&pairs, config, factor)
            }
            _ => pairs.iter().map(|pair| (pair.1, pair.2)).collect(),
        };
        for t in first..first + length {
            let mut add = |term: Vec<f64>, by: f64| {
                y[t].iter_mut().zip(term).for_each(|(y, x)| *y += by * x);
            };
            for shared in 0..config.n_shared_experts {
                add(ffn(tiny, "shared_experts", shared * m..(shared + 1) * m, 1.0, &u[t]), 1.0);
            }
            for (score, _, expert) in
                pairs.iter().filter(|pair| kept.contains(&(t, pair.2)) && pair.1 == t)
            {
                add(ffn(tiny, &format!("experts.{expert}"), 0..m, scale, &u[t]), *score);
            }
            bare.extend((!kept.iter().any(|pair| pair.0 == t)).then_some(t));
        }
        first += length;
    }
    (y, bare)
}

/// What the layer itself makes of the same.
fn layer(
    tiny: &Tiny<'_>,
    u: &Rows,
    h: &Rows,
    lengths: &[usize],
    factor: Option<(f64, &[u32])>,
) -> Rows {
    let (kernels, width) = (tiny.kernels, tiny.model.config.hidden_size);
    let owner = kernels.arena().owner("policy", Kind::Packed);
    let format = WeightFormat::default();
    let packing = Packing { kernels, owner, version: 0, format, training: false, ranks: None };
    let index = &tiny.model.layout.layers[1].feed_forward;
    let moe = Moe::pack(&packing, &tiny.params, &tiny.model.config, index, None).unwrap();
    let number = |(i, length): (usize, &usize)| vec![i as u32; *length];
    let segment: Vec<u32> = lengths.iter().enumerate().flat_map(number).collect();
    let segment = indices(kernels, &segment).unwrap();
    let capacity = factor.map(|(factor, protected)| Capacity {
        factor,
        protected: indices(kernels, protected).unwrap(),
    });
    let (u, mut y) = (uploaded(kernels, u), uploaded(kernels, h));
    moe.forward(kernels, &u, &mut y, capacity.as_ref().map(|c| (c, &segment))).unwrap();
    kernels.download_f64(&y).chunks(width).map(<[f64]>::to_vec).collect()
}

fn uploaded(kernels: &dyn Kernels, rows: &Rows) -> Buffer {
    let owner = kernels.arena().owner("test", Kind::Activations);
    let mut buffer =
        kernels.arena().buffer(owner, kernels.float(), rows.len(), rows[0].len()).unwrap();
    kernels.upload_f64(&rows.concat(), &mut buffer);
    buffer
}

fn random_rows(key: u64, rows: usize, cols: usize) -> Rows {
    let number = |i, j| random::normal(4, Stream::Data, [key, i as u64, j as u64, 0]);
    (0..rows).map(|i| (0..cols).map(|j| number(i, j)).collect()).collect()
}

#[test]
fn a_layer_of_experts_equals_plain_loops_over_single_experts_with_and_without_drops() {
    let mut config = config_grouped();
    config.routed_scaling_factor = 16.0;
    let lengths = [9, 14, 6, 1];
    let tokens = lengths.iter().sum();
    let (u, h) = (random_rows(1, tokens, 12), random_rows(2, tokens, 12));
    let (f64s, f32s) = (reference(), cpu(2));
    for (kernels, tolerance) in [(&f64s as &dyn Kernels, 1e-11), (&f32s, 1e-4)] {
        let tiny = Tiny::new(kernels, &config, false);
        for factor in [None, Some((1.0, [0, 1, 0, 0])), Some((0.2, [0, 0, 0, 0]))] {
            let factor = factor.as_ref().map(|(factor, protected)| (*factor, &protected[..]));
            let (wanted, bare) = plain_layer(&tiny, &u, &h, &lengths, factor);
            let found = layer(&tiny, &u, &h, &lengths, factor);
            for (t, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                for (found, wanted) in found.iter().zip(wanted) {
                    let error = (found - wanted).abs() / (1.0 + wanted.abs());
                    assert!(error < tolerance, "{factor:?}, token {t}: {found} for {wanted}");
                }
            }
            // A token that lost everything is residual and shared experts alone.
            let loses = factor.is_some_and(|(factor, _)| factor < 0.5);
            assert_eq!(!bare.is_empty(), loses, "{factor:?}");
            for t in bare {
                let shared = ffn(&tiny, "shared_experts", 0..12, 1.0, &u[t]);
                for ((found, h), shared) in found[t].iter().zip(&h[t]).zip(shared) {
                    assert!((found - h - shared).abs() < 10.0 * tolerance, "token {t}");
                }
            }
        }
    }
}

#[test]
fn a_gate_fed_with_bf16_computes_its_scores_in_f32() {
    let (f64s, f32s) = (reference(), cpu(1));
    let config = config_grouped();
    let gate = tensor(&Tiny::new(&f64s, &config, false), "gate");
    // What bf16 can hold: the upper half of an f32.
    let short = |x: &f64| f64::from(f32::from_bits((*x as f32).to_bits() & 0xffff_0000));
    let u: Rows =
        random_rows(3, 400, 12).iter().map(|row| row.iter().map(short).collect()).collect();
    let tiny = Tiny::new(&f32s, &config, false);
    let owner = f32s.arena().owner("policy", Kind::Packed);
    let format = WeightFormat::default();
    let packing =
        Packing { kernels: &f32s, owner, version: 0, format, training: false, ranks: None };
    let index = tiny.model.layout.specs.iter().position(|s| s.name.ends_with("1.mlp.gate.weight"));
    let (index, spec) = (index.unwrap(), router_spec(&config));
    let linear = Linear::pack(&packing, &tiny.params, index..index + 1, 1).unwrap();
    let rows = |cols| uploaded(&f32s, &vec![vec![0.0; cols]; 400]);
    let (mut logits, mut scores, mut weights) = (rows(8), rows(8), rows(3));
    let mut experts = index_buffer(&f32s, 400, 3).unwrap();
    linear.forward(&f32s, &uploaded(&f32s, &u), &mut logits, Store::Set);
    f32s.router(&spec, &logits, &mut scores, &mut experts, &mut weights);
    for (found, u) in f32s.download_f64(&scores).chunks(8).zip(&u) {
        assert!((found.iter().sum::<f64>() - 1.0).abs() < 1e-6);
        let (wanted, _) = choose(&config, &gate, u);
        assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-6), "{found:?}");
    }
}

#[test]
fn an_expert_without_a_token_has_no_gradient_and_every_balance_loss_moves_the_gate() {
    let (kernels, config) = (reference(), config_grouped());
    let tiny = Tiny::new(&kernels, &config, false);
    let texts = [Sequence::all_targets(vec![3, 7, 11])];
    let gradients = |balance| tiny.trained(&Items::Documents(&texts), Expanded, balance, None);
    let (_, without, routings) = gradients(Balance::NONE);
    let of = |gradients: &rehearsal::model::Gradients, name: &str| {
        let index = tiny.model.layout.specs.iter().position(|spec| spec.name == name).expect(name);
        kernels.download_f64(&gradients.slab.tensor(index))
    };
    let (mut idle, mut moved) = (0, 0);
    for (expert, tokens) in routings[0].experts.iter().enumerate() {
        let parts = ["gate_proj", "up_proj", "down_proj"].map(|part| {
            let name = format!("model.layers.1.mlp.experts.{expert}.{part}.weight");
            of(&without, &name).iter().any(|gradient| *gradient != 0.0)
        });
        idle += usize::from(*tokens == 0);
        moved += usize::from(parts == [true; 3]);
        assert!(*tokens > 0 || parts == [false; 3], "expert {expert} is idle and moves");
    }
    // The last token predicts nothing; the experts of the first all learn.
    assert!((1..6).contains(&idle) && moved >= 3, "{idle} experts are idle, {moved} move");
    let gate = |balance| of(&gradients(balance).1, "model.layers.1.mlp.gate.weight");
    let none = gate(Balance::NONE);
    assert_ne!(gate(Balance::of_experts(0.1)), none);
    assert_ne!(gate(Balance { device: 0.1, ..Balance::NONE }), none);
    assert_ne!(gate(Balance { communication: 0.1, ..Balance::NONE }), none);
}
