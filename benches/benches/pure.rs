//! Criterion: compile, render, plan and one change, without a kernel. `cargo bench -p shunt-bench`.

// What `criterion_group` makes has no comments.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use shunt_bench::change::{Programmed, compile, plan_everything};
use shunt_mode::Backend;
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::kernel::Netlink;

const SIZES: [usize; 2] = [1_000, 10_000];
const ENDPOINTS: usize = 10;

fn of_mode<B: Backend>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group(B::MODE.name());
    group.sample_size(10);
    for services in SIZES {
        let mut programmed = Programmed::<B>::new(services, ENDPOINTS);
        group.bench_function(BenchmarkId::new("plan everything", services), |bencher| {
            bencher.iter(|| black_box(plan_everything::<B>(programmed.table())));
        });
        let mut number = 0;
        group.bench_function(BenchmarkId::new("one change", services), |bencher| {
            bencher.iter(|| {
                number += 1;
                black_box(programmed.one_change(number))
            });
        });
    }
    group.finish();
}

fn of_compiler(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compiler");
    group.sample_size(10);
    for services in SIZES {
        let programmed = Programmed::<Nftables<Netlink>>::new(services, ENDPOINTS);
        group.bench_function(BenchmarkId::new("everything", services), |bencher| {
            bencher.iter(|| black_box(compile(programmed.store())));
        });
    }
    group.finish();
}

criterion_group!(pure, of_compiler, of_mode::<Nftables<Netlink>>);
criterion_main!(pure);
