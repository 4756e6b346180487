//! The two heads: log-probabilities over the vocabulary, and a reward model's scalar.
//!
//! Both read only the rows they are asked for: the hidden rows are gathered, then the final norm is applied.

use super::linear::{Linear, Packing};
use super::norm::{Norm, Normed};
use super::params::{Gradients, Params};
use super::pass::{Pass, PassError, floats};
use crate::config::ModelConfig;
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, ROW_GAP, Store, WeightFormat};

/// Probabilities that are kept for a backward pass at most.
pub(super) const MOST_KEPT: usize = 32 << 20;

/// Rows whose logits ranks of a tensor group gather at once.
const TILE: usize = 64;

/// The packed heads of a model.
pub struct Heads {
    norm: Norm,
    vocabulary: Linear,
    /// Tokens of it, over all ranks.
    tokens: usize,
    scalar: Option<Linear>,
}

/// Rows of the residual stream, gathered and normed.
struct Gathered {
    rows: Buffer,
    x: Buffer,
    normed: Normed,
}

/// Log-probabilities of targets, and what the backward pass needs.
pub struct VocabularyOutput {
    gathered: Gathered,
    targets: Buffer,
    temperature: f64,
    /// Probabilities, where they are few enough to keep; the columns beyond the vocabulary mean nothing.
    kept: Option<Buffer>,
    /// log-softmax(logits / T) at each target.
    pub logprobs: Vec<f64>,
    /// Entropy of each row's distribution at T, nats.
    pub entropies: Vec<f64>,
}

/// Scores of sequences, and what the backward pass needs.
pub struct ScalarOutput {
    gathered: Gathered,
    /// One score per row asked for.
    pub scores: Vec<f64>,
}

impl Heads {
    /// Packs the weights.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
    ) -> Result<Heads, OutOfMemory> {
        let layout = params.layout.clone();
        let [norm, head] =
            [layout.norm, layout.head].map(|index| index.expect("packed where the heads are"));
        let linear =
            |index: usize, format| Linear::pack(&packing.kept(format), params, index..index + 1, 1);
        let format = of_vocabulary(packing.format);
        Ok(Heads {
            norm: Norm { weight: norm, epsilon: config.rms_norm_eps, factor: 1.0 },
            vocabulary: match layout.is_tied {
                // The embedding is whole on every rank.
                true => linear(head, format)?,
                false => Linear::pack_cut(&packing.kept(format), params, head)?,
            },
            tokens: config.vocab_size,
            scalar: layout.score.map(|score| linear(score, WeightFormat::F32)).transpose()?,
        })
    }

    /// Log-probability of `targets[i]` after hidden row `rows[i]`, at `temperature`. `keep` spares the backward pass a
    /// product, for the memory of the rows' probabilities.
    pub fn logprobs(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        hidden: &Buffer,
        rows: &[u32],
        targets: &[u32],
        temperature: f64,
        keep: bool,
    ) -> Result<VocabularyOutput, OutOfMemory> {
        let kernels = pass.kernels;
        let gathered = self.gather(kernels, params, hidden, rows)?;
        let targets = super::pass::indices(kernels, targets)?;
        let [mut logprob, mut entropy] = [pass.floats(rows.len(), 1)?, pass.floats(rows.len(), 1)?];
        let vocabulary = self.vocabulary.outputs();
        let mut kept = match keep && rows.len() * vocabulary <= MOST_KEPT {
            true => Some(pass.floats(rows.len(), vocabulary + ROW_GAP)?),
            false => None,
        };
        let head = self.vocabulary.packed();
        kernels.head_logprob(
            &gathered.normed.y,
            head,
            &targets,
            temperature,
            &mut logprob,
            &mut entropy,
            kept.as_mut().map(|kept| kept.cols_of_mut(0..vocabulary)).as_deref_mut(),
        )?;
        let (logprobs, entropies) =
            (kernels.download_f64(&logprob), kernels.download_f64(&entropy));
        Ok(VocabularyOutput { gathered, targets, temperature, kept, logprobs, entropies })
    }

    /// The same log-probabilities where nothing is trained. Ranks of a tensor group have some of the logits each, and
    /// gather them by tiles of rows: a sum of each rank's sum would round otherwise than one rank's.
    pub fn score(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        hidden: &Buffer,
        rows: &[u32],
        targets: &[u32],
        temperature: f64,
    ) -> Result<Vec<f64>, PassError> {
        if self.vocabulary.outputs() == self.tokens {
            return Ok(self
                .logprobs(pass, params, hidden, rows, targets, temperature, false)?
                .logprobs);
        }
        let kernels = pass.kernels;
        let mut logprobs = Vec::with_capacity(rows.len());
        for (rows, targets) in rows.chunks(TILE).zip(targets.chunks(TILE)) {
            let mut logits = self.logits(kernels, params, hidden, rows)?;
            let mut logprob = pass.floats(rows.len(), 1)?;
            let targets = super::pass::indices(kernels, targets)?;
            kernels.logits_logprob(&mut logits, &targets, temperature, &mut logprob);
            logprobs.extend(kernels.download_f64(&logprob));
        }
        Ok(logprobs)
    }

    /// Adds to d_hidden and to the head's and the final norm's gradients, given d(loss)/d(logprob) per row.
    pub fn backward_logprobs(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        mut output: VocabularyOutput,
        coefficients: &[f64],
        d_hidden: &mut Buffer,
        gradients: &mut Gradients,
    ) -> Result<(), OutOfMemory> {
        let kernels = pass.kernels;
        let x = &output.gathered.normed.y;
        let mut c = pass.floats(x.rows(), 1)?;
        kernels.upload_f64(coefficients, &mut c);
        let mut dx = pass.floats(x.rows(), x.cols())?;
        let vocabulary = self.vocabulary.outputs();
        kernels.head_logprob_backward(
            x,
            self.vocabulary.packed(),
            self.vocabulary.plain(),
            &output.targets,
            output.temperature,
            &c,
            output.kept.as_mut().map(|kept| kept.cols_of_mut(0..vocabulary)).as_deref_mut(),
            &mut dx,
            &mut gradients.span(self.vocabulary.tensors.clone()),
        )?;
        self.scatter(kernels, params, &output.gathered, &dx, d_hidden, gradients)
    }

    /// Adds a gradient of zero to the vocabulary head and the final norm.
    pub fn nothing(&self, gradients: &mut Gradients) {
        gradients.tensor(self.norm.weight);
        gradients.span(self.vocabulary.tensors.clone());
    }

    /// The scalar head at hidden rows `rows`.
    pub fn scores(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        hidden: &Buffer,
        rows: &[u32],
    ) -> Result<ScalarOutput, OutOfMemory> {
        let gathered = self.gather(pass.kernels, params, hidden, rows)?;
        let mut scores = pass.floats(rows.len(), 1)?;
        self.scalar().forward(pass.kernels, &gathered.normed.y, &mut scores, Store::Set);
        Ok(ScalarOutput { gathered, scores: pass.kernels.download_f64(&scores) })
    }

    /// Adds to d_hidden and to the gradients, given d(loss)/d(score) per row.
    pub fn backward_scores(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        output: &ScalarOutput,
        coefficients: &[f64],
        d_hidden: &mut Buffer,
        gradients: &mut Gradients,
    ) -> Result<(), OutOfMemory> {
        let kernels = pass.kernels;
        let x = &output.gathered.normed.y;
        let mut c = pass.floats(x.rows(), 1)?;
        kernels.upload_f64(coefficients, &mut c);
        let mut dx = pass.floats(x.rows(), x.cols())?;
        self.scalar().backward_input(kernels, &c, &mut dx, Store::Set);
        self.scalar().backward_weight(kernels, &c, x, gradients);
        self.scatter(kernels, params, &output.gathered, &dx, d_hidden, gradients)
    }

    /// Logits of hidden rows `rows`, for the sampler; all of them on every rank of a tensor group.
    pub fn logits(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        hidden: &Buffer,
        rows: &[u32],
    ) -> Result<Buffer, PassError> {
        let x = self.gather(kernels, params, hidden, rows)?.normed.y;
        let mut logits = floats(kernels, rows.len(), self.tokens)?;
        self.vocabulary.forward_all(kernels, "logits", &x, &mut logits, Store::Set)?;
        Ok(logits)
    }

    fn scalar(&self) -> &Linear {
        self.scalar.as_ref().expect("a reward model has a scalar head")
    }

    fn gather(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        hidden: &Buffer,
        rows: &[u32],
    ) -> Result<Gathered, OutOfMemory> {
        let rows = super::pass::indices(kernels, rows)?;
        let mut x = floats(kernels, rows.rows(), hidden.cols())?;
        kernels.gather_rows(hidden, &rows, &mut x);
        let normed = self.norm.forward(kernels, params, &x)?;
        Ok(Gathered { rows, x, normed })
    }

    fn scatter(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        gathered: &Gathered,
        d_normed: &Buffer,
        d_hidden: &mut Buffer,
        gradients: &mut Gradients,
    ) -> Result<(), OutOfMemory> {
        let mut dx = floats(kernels, d_normed.rows(), d_normed.cols())?;
        self.norm.backward_input(
            kernels,
            params,
            d_normed,
            &gathered.x,
            &gathered.normed,
            &mut dx,
            Store::Set,
        );
        self.norm.backward_weight(kernels, d_normed, &gathered.x, &gathered.normed, gradients);
        kernels.scatter_add_rows(&dx, &gathered.rows, d_hidden);
        Ok(())
    }
}

/// The format of the vocabulary head, which is not kept in FP8: its numbers have 4 bits of precision. A reward model's head is
/// always f32.
pub(super) fn of_vocabulary(format: WeightFormat) -> WeightFormat {
    match format {
        WeightFormat::F32 | WeightFormat::Int8 => format,
        _ => WeightFormat::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_is_in_integers_where_all_is_and_never_in_fp8() {
        let formats = WeightFormat::ALL.map(of_vocabulary);
        let bf16 = WeightFormat::Bf16;
        assert_eq!(formats, [WeightFormat::F32, bf16, bf16, bf16, WeightFormat::Int8]);
    }
}
