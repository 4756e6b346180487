//! Agreement: each problem on the CPU kernels against the f64 reference, within its tolerance.

use crate::bench::{Bench, check_close};
use crate::problems;
use rehearsal_kernels::{Arena, CpuKernels, ReferenceKernels};

#[test]
fn every_operation_of_the_cpu_agrees_with_the_reference() {
    let (cpu, reference) =
        (CpuKernels::new(2, Arena::new(None)), ReferenceKernels::new(Arena::new(None)));
    let (cpu, reference) = (Bench::new(&cpu), Bench::new(&reference));
    for problem in problems::all() {
        let (got, want) = ((problem.run)(&cpu), (problem.run)(&reference));
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            check_close(&format!("{}, {name}", problem.name), got, want, problem.tolerance);
        }
    }
}
