//! Segments that continue a stem: the bits of sequences that repeat it, and its gradient.

use super::*;

/// Stems around the sizes of blocks and panels, and the lengths of what continues them; one is never continued.
const FAMILIES: [(usize, &[usize]); 7] = [
    (1, &[1, 40]),
    (5, &[33, 2, 27]),
    (31, &[1, 1]),
    (32, &[1, 64]),
    (33, &[31]),
    (70, &[7, 58, 26]),
    (12, &[]),
];

/// The two columns of `start`.
fn starts() -> Vec<u32> {
    let (mut starts, mut end) = (Vec::new(), 0);
    for (stem, branches) in FAMILIES {
        let first = end;
        for length in std::iter::once(&stem).chain(branches) {
            starts.extend((0..*length).flat_map(|_| [end as u32, first as u32]));
            end += length;
        }
    }
    starts
}

/// For each branch (or stem without any) the rows of its whole sequence, and how many are the stem's.
fn sequences() -> Vec<(Vec<usize>, usize)> {
    let (mut sequences, mut end) = (Vec::new(), 0);
    for (stem, branches) in FAMILIES {
        let stem = end..end + stem;
        end = stem.end;
        if branches.is_empty() {
            sequences.push((stem.clone().collect(), 0));
        }
        for length in branches {
            sequences.push((stem.clone().chain(end..end + length).collect(), stem.len()));
            end += length;
        }
    }
    sequences
}

fn rows_at(cx: &Cx, b: &Buffer, rows: &[usize]) -> Buffer {
    let (cols, all) = (b.cols(), read(b));
    let picked: Vec<f32> =
        rows.iter().flat_map(|row| all[row * cols..(row + 1) * cols].to_vec()).collect();
    floats(cx, rows.len(), cols, &picked)
}

/// The case with each stem repeated before every segment that continues it.
fn repeated(cx: &Cx, case: &Case) -> Case {
    let sequences = sequences();
    let lengths: Vec<usize> = sequences.iter().map(|(rows, _)| rows.len()).collect();
    let rows: Vec<usize> = sequences.into_iter().flat_map(|(rows, _)| rows).collect();
    let at = |b: &Buffer| rows_at(cx, b, &rows);
    let Case { shape, q, kv, k_rope, d_o, .. } = case;
    Case {
        q: at(q),
        kv: at(kv),
        k_rope: at(k_rope),
        d_o: at(d_o),
        ..Case::new(cx, *shape, &lengths)
    }
}

#[test]
fn a_shared_stem_gives_the_bits_of_a_repeated_one() {
    let cx = cx(2);
    for shape in [expanded(), absorbed(), grouped()] {
        let case = Case::of(&cx, shape, &starts(), 2);
        let [o, lse, ..] = case.run(&cx);
        let [whole_o, whole_lse, ..] = repeated(&cx, &case).run(&cx);
        let width = shape.heads * shape.value_width;
        let mut at = 0;
        for (rows, _) in sequences() {
            for row in rows {
                let bits = |x: &[f32], row: usize, cols: usize| -> Vec<u32> {
                    x[row * cols..(row + 1) * cols].iter().map(|x| x.to_bits()).collect()
                };
                assert_eq!(bits(&o, row, width), bits(&whole_o, at, width), "row {row}");
                assert_eq!(bits(&lse, row, shape.heads), bits(&whole_lse, at, shape.heads));
                at += 1;
            }
        }
    }
}

#[test]
fn gradients_through_a_shared_stem_match_plain_f64_loops_in_every_form() {
    let cx = cx(2);
    for (name, shape) in
        [("expanded", expanded()), ("absorbed", absorbed()), ("grouped", grouped())]
    {
        let case = Case::of(&cx, shape, &starts(), 2);
        let (found, wanted) = (case.run(&cx), case.naive());
        for (i, part) in ["o", "lse", "dq", "dkv", "dk_rope"].iter().enumerate() {
            let tolerance = if i < 2 { 1e-6 } else { 4e-6 };
            check_close(&format!("{name} {part}"), &found[i], &wanted[i], tolerance);
        }
    }
}

#[test]
fn a_stem_with_one_branch_is_one_sequence_to_the_bit() {
    let cx = cx(2);
    for shape in [expanded(), absorbed(), grouped()] {
        for (stem, branch) in [(1, 1), (5, 60), (32, 32), (33, 31), (70, 1)] {
            let rows = stem + branch;
            let starts: Vec<u32> =
                (0..rows).flat_map(|row| [if row < stem { 0 } else { stem as u32 }, 0]).collect();
            let (split, whole) = (
                Case::of(&cx, shape, &starts, 2).run(&cx),
                Case::new(&cx, shape, &[rows]).run(&cx),
            );
            assert_eq!(bits(&split), bits(&whole), "{stem} and {branch}");
        }
    }
}

#[test]
fn threads_and_instruction_sets_change_no_bit_of_what_a_stem_is_given() {
    for shape in [expanded(), absorbed(), grouped()] {
        let one = with(1, Isa::Portable);
        let wanted = bits(&Case::of(&one, shape, &starts(), 2).run(&one));
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                let cx = with(threads, isa);
                let found = bits(&Case::of(&cx, shape, &starts(), 2).run(&cx));
                assert_eq!(found, wanted, "{isa:?} {threads}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "a stem is an earlier segment without a stem")]
fn a_branch_of_a_branch_is_refused() {
    let cx = cx(1);
    Case::of(&cx, expanded(), &[0, 0, 1, 0, 2, 1], 2).run(&cx);
}
