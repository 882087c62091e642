//! Charts of a run as inline SVG that takes its colours from the page's style sheet.
//!
//! The drawing library writes fixed colours; a few that no chart would choose stand for roles (text, grid, series) and are
//! exchanged for style-sheet classes afterwards, so that one drawing serves light and dark pages.

use super::rows::{Row, Run};
use crate::Failure;
use crate::units::size;
use kvxfer_core::Op;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::BTreeSet;

/// Colours that stand for roles, with what they become.
const TEXT: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(2, 3, 4);
/// One per series; index = role in the page's style sheet (`--s0` …).
const SERIES: [RGBColor; 8] = [
    RGBColor(3, 4, 50),
    RGBColor(3, 4, 51),
    RGBColor(3, 4, 52),
    RGBColor(3, 4, 53),
    RGBColor(3, 4, 54),
    RGBColor(3, 4, 55),
    RGBColor(3, 4, 56),
    RGBColor(3, 4, 57),
];

/// The role of a series' line that is dashed.
fn dashed(series: RGBColor) -> RGBColor {
    RGBColor(series.0, series.1 + 1, series.2)
}

/// A drawing with the words that introduce it.
pub(super) struct Chart {
    pub title: String,
    pub legend: Vec<(String, usize, bool)>,
    pub svg: String,
}

/// GB/s over piece size, one chart per direction and order; a transport and its baseline share a colour.
pub(super) fn throughput(run: &Run) -> Result<Vec<Chart>, Failure> {
    let mut charts = Vec::new();
    for op in [Op::Write, Op::Read] {
        for pattern in ["ordered", "random"] {
            let rows: Vec<&Row> = run
                .rows
                .iter()
                .filter(|r| r.source.is_some_and(|c| c.op == op) && r.pattern == pattern && r.gbps.is_some())
                .collect();
            let sizes: BTreeSet<u64> = rows.iter().map(|r| r.piece_bytes).collect();
            if sizes.len() < 2 {
                continue;
            }
            let sizes: Vec<u64> = sizes.into_iter().collect();
            charts.push(Chart {
                title: format!("{}, {pattern} pieces", super::cases::op_name(op)),
                legend: Vec::new(),
                svg: String::new(),
            });
            let series = collect(&rows);
            let last = charts.len() - 1;
            charts[last].legend = series.iter().map(|s| (s.name.clone(), s.colour, s.dashed)).collect();
            charts[last].svg = lines(&sizes, &series)?;
        }
    }
    Ok(charts)
}

struct Series {
    name: String,
    colour: usize,
    dashed: bool,
    points: Vec<(u64, f64)>,
}

fn collect(rows: &[&Row]) -> Vec<Series> {
    let mut out: Vec<Series> = Vec::new();
    let mut add =
        |name: String, colour, dashed, point: (u64, f64)| match out.iter_mut().find(|s| s.name == name) {
            Some(s) => {
                if !s.points.iter().any(|p| p.0 == point.0) {
                    s.points.push(point);
                }
            }
            None => out.push(Series { name, colour, dashed, points: vec![point] }),
        };
    let colour = |transport: &str| match transport {
        "shm" => 0,
        "cma" => 1,
        "tcp" => 2,
        "nixl" => 3,
        _ => 4,
    };
    for r in rows {
        let Some((case, rate)) = r.source.zip(r.gbps) else { continue };
        let level = super::cases::level_name(case.integrity);
        add(
            format!("{} ({level})", r.transport),
            colour(&r.transport),
            level == "full",
            (r.piece_bytes, rate),
        );
    }
    for r in rows {
        if let (Some(b), Some(rate)) = (&r.baseline, r.baseline_gbps) {
            let (name, colour) = match b.as_str() {
                "memcpy" => ("memcpy, one thread", 5),
                "process_vm" => ("process_vm_*, raw", 6),
                "sockets" => ("raw sockets", 7),
                _ => ("NIXL, bare", 4),
            };
            add(name.into(), colour, true, (r.piece_bytes, rate));
        }
    }
    for s in &mut out {
        s.points.sort_by_key(|p| p.0);
    }
    out
}

fn lines(sizes: &[u64], series: &[Series]) -> Result<String, Failure> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (640, 300)).into_drawing_area();
        draw(&area, sizes, series).map_err(|e| Failure::new(format!("chart: {e}")))?;
    }
    Ok(themed(&svg))
}

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw<'a>(area: &DrawingArea<SVGBackend<'a>, Shift>, sizes: &[u64], series: &[Series]) -> Drawn<'a> {
    let top = series.iter().flat_map(|s| &s.points).map(|p| p.1).fold(1.0, f64::max) * 1.08;
    let label = TextStyle::from(("sans-serif", 17).into_font()).color(&TEXT);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(28)
        .x_label_area_size(34)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..(sizes.len() - 1) as f64, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(sizes.len())
        .y_labels(6)
        .x_label_formatter(&|x| {
            sizes.get(x.round() as usize).filter(|_| x.fract() == 0.0).map_or(String::new(), |s| size(*s))
        })
        .y_label_formatter(&|y| format!("{y:.0}"))
        .y_desc("GB/s")
        .axis_style(TEXT)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(label.clone())
        .axis_desc_style(label)
        .draw()?;
    for s in series {
        let at = |size: u64| sizes.iter().position(|x| *x == size).unwrap_or(0) as f64;
        let points: Vec<(f64, f64)> = s.points.iter().map(|p| (at(p.0), p.1)).collect();
        let role = if s.dashed { dashed(SERIES[s.colour]) } else { SERIES[s.colour] };
        chart.draw_series(LineSeries::new(points.clone(), role.stroke_width(2)))?;
        let (radius, filled) = (3, SERIES[s.colour].filled());
        chart.draw_series(points.into_iter().map(|p| Circle::new(p, radius, filled)))?;
    }
    area.present()
}

/// Roles become style-sheet variables; the drawing scales with the page.
fn themed(svg: &str) -> String {
    let hex = |c: RGBColor| format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2);
    let mut out = svg.replace(&hex(TEXT), "var(--ink)").replace(&hex(GRID), "var(--grid)");
    for (i, c) in SERIES.into_iter().enumerate() {
        // Dashes are the viewer's to draw. (The library's own would need a glibc of 2022 for `hypotf`.)
        out = out.replace(&hex(dashed(c)), &format!("var(--s{i})\" stroke-dasharray=\"6 4"));
        out = out.replace(&hex(c), &format!("var(--s{i})"));
    }
    out.replacen("width=\"640\" height=\"300\"", "role=\"img\"", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_becomes_a_variable_and_baselines_are_dashed() {
        let series = |colour, dashed, rate| Series {
            name: String::new(),
            colour,
            dashed,
            points: vec![(4096, rate), (65_536, 2.0 * rate)],
        };
        let svg = lines(&[4096, 65_536], &[series(0, false, 3.0), series(5, true, 4.0)]).expect("drawing");
        assert!(!svg.contains("#0"), "a role's colour was left: {svg}");
        let drawn: Vec<&str> = svg.split('<').filter(|e| e.starts_with("polyline")).collect();
        let line =
            |role| drawn.iter().find(|e| e.contains(role)).unwrap_or_else(|| panic!("{role}: {drawn:?}"));
        assert!(line("stroke=\"var(--s5)\"").contains("stroke-dasharray=\"6 4\""));
        assert!(!line("stroke=\"var(--s0)\"").contains("dasharray"));
    }
}
