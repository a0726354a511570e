//! Curves.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::Report;
use crate::latency::Target;

/// A finished plot.
pub(super) struct Plot {
    /// Part of the file name.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// The picture.
    pub svg: String,
}

/// Points by subject.
type Curves = BTreeMap<String, Vec<(f64, f64)>>;

const SIZE: (u32, u32) = (900, 520);

/// All plots for which there are points.
pub(super) fn all(report: &Report) -> Result<Vec<Plot>> {
    let latency = |target| {
        let mut curves = Curves::new();
        for cell in report.latency.iter().filter(|cell| cell.target == target) {
            let points = curves.entry(cell.subject.clone()).or_default();
            // One Service was measured twice: the last time beside the largest cluster.
            points.retain(|(services, _)| *services as usize != cell.services);
            points.push((cell.services as f64, cell.p50_us));
        }
        curves
    };
    let mut cold = Curves::new();
    for measured in report.control.cold.iter().filter(|cold| cold.endpoints == 10) {
        cold.entry(measured.subject.clone()).or_default().push((measured.services as f64, measured.whole_ms));
    }
    let mut churn = Curves::new();
    for measured in &report.control.churn {
        let Some(rate) = measured.rates.last() else { continue };
        for (name, value) in [("p50", rate.ms[0]), ("p99", rate.ms[2])] {
            let curve = churn.entry(format!("{} {name}", measured.subject)).or_default();
            curve.push((measured.services as f64, value));
        }
    }
    let wanted = [
        ("cluster-ip", "First packet to any cluster IP, p50", "µs", latency(Target::Random)),
        ("node-port", "First packet to any node port, p50", "µs", latency(Target::NodePort)),
        ("cold-start", "Start to last rule, ten endpoints each", "ms", cold),
        ("changes", "Event to kernel", "ms", churn),
    ];
    let mut plots = Vec::new();
    for (name, title, unit, curves) in wanted {
        if curves.values().any(|points| points.len() > 1) {
            let svg = draw(title, unit, curves).map_err(|error| anyhow!("plot {name}: {error}"))?;
            plots.push(Plot { name, title, svg });
        }
    }
    Ok(plots)
}

fn draw(title: &str, unit: &str, curves: Curves) -> Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let points = || curves.values().flatten();
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
            (low / 1.2)..(high * 1.2)
        };
        let x = range(&mut points().map(|point| point.0));
        let y = range(&mut points().map(|point| point.1));
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 22))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x.log_scale(), y.log_scale())?;
        chart.configure_mesh().x_desc("Services").y_desc(unit).draw()?;
        for (i, (name, mut points)) in curves.into_iter().enumerate() {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let colour = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)).point_size(3))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}
