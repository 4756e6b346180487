//! Experts that one tensor holds, as newer versions of transformers keep them, seen under the published names.
//!
//! `mlp.experts.gate_up_proj [E, 2I, H]` holds for every expert the rows of its gate over those of its up projection,
//! `mlp.experts.down_proj [E, H, I]` its down projection. Each part is a run of whole rows, so that it can be read in
//! place. Knows no data.

/// A tensor that lies inside another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Published name.
    pub(super) name: String,
    /// Dimensions.
    pub(super) shape: Vec<usize>,
    /// The first of its elements in the tensor that holds it.
    pub(super) first: usize,
}

/// More experts than any model may have (`n_routed_experts`).
const MOST_EXPERTS: usize = 1 << 16;
const GATE_UP: &str = ".mlp.experts.gate_up_proj";
const DOWN: &str = ".mlp.experts.down_proj";

/// The experts that a tensor of this name and shape holds; `None` if it is no tensor of fused experts.
pub(super) fn parts(name: &str, shape: &[usize]) -> Result<Option<Vec<Part>>, String> {
    let (layer, projections): (&str, &[&str]) = if let Some(layer) = name.strip_suffix(GATE_UP) {
        (layer, &["gate_proj", "up_proj"])
    } else if let Some(layer) = name.strip_suffix(DOWN) {
        (layer, &["down_proj"])
    } else {
        return Ok(None);
    };
    let count = projections.len();
    let &[experts, rows, cols] = shape else {
        return Err(format!(
            "tensor {name} of all experts has shape {shape:?}; expected three dimensions"
        ));
    };
    if experts > MOST_EXPERTS {
        return Err(format!("tensor {name} has {experts} experts, more than {MOST_EXPERTS}"));
    }
    if experts == 0 || rows == 0 || cols == 0 || !rows.is_multiple_of(count) {
        return Err(format!(
            "tensor {name} of all experts has shape {shape:?}; expected [experts, {} rows, columns], none of them 0",
            if count == 2 { "an even number of" } else { "its" }
        ));
    }
    let rows = rows / count;
    let part = |index: usize| Part {
        name: format!(
            "{layer}.mlp.experts.{}.{}.weight",
            index / count,
            projections[index % count]
        ),
        shape: vec![rows, cols],
        first: index * rows * cols,
    };
    Ok(Some((0..experts * count).map(part).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expert_is_a_run_of_rows_under_its_published_name() {
        let found = parts("model.layers.3.mlp.experts.gate_up_proj", &[2, 6, 5]).unwrap().unwrap();
        let named: Vec<(&str, &[usize], usize)> =
            found.iter().map(|p| (p.name.as_str(), p.shape.as_slice(), p.first)).collect();
        assert_eq!(
            named,
            [
                ("model.layers.3.mlp.experts.0.gate_proj.weight", &[3, 5][..], 0),
                ("model.layers.3.mlp.experts.0.up_proj.weight", &[3, 5][..], 15),
                ("model.layers.3.mlp.experts.1.gate_proj.weight", &[3, 5][..], 30),
                ("model.layers.3.mlp.experts.1.up_proj.weight", &[3, 5][..], 45),
            ]
        );
        let down = parts("model.layers.3.mlp.experts.down_proj", &[2, 5, 3]).unwrap().unwrap();
        assert_eq!(down[1].name, "model.layers.3.mlp.experts.1.down_proj.weight");
        assert_eq!((down[1].shape.as_slice(), down[1].first), (&[5, 3][..], 15));
    }

    #[test]
    fn only_whole_experts_are_taken() {
        assert_eq!(parts("model.layers.3.mlp.experts.0.down_proj.weight", &[5, 3]), Ok(None));
        assert_eq!(parts("model.layers.3.mlp.gate.weight", &[5, 3]), Ok(None));
        for shape in [&[6, 5][..], &[2, 5, 5], &[0, 6, 5], &[1 << 40, 6, 5], &[2, 6, 0]] {
            let fault = parts("a.mlp.experts.gate_up_proj", shape).unwrap_err();
            assert!(fault.contains("a.mlp.experts.gate_up_proj"), "{fault}");
        }
        assert!(parts("a.mlp.experts.down_proj", &[2, 0, 3]).is_err());
    }
}
