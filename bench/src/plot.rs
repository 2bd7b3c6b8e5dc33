//! Pictures of a comparison: one SVG per theme, bars grouped by workload.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::REFERENCE;
use crate::results::{Drain, Lag, Pass, Results};

const FONT: &str = "sans-serif";

/// The same contestant has the same colour everywhere; told apart by most colour-blind eyes (Okabe
/// and Ito).
fn colour(contestant: &str, number: usize) -> RGBColor {
    match contestant {
        "dr-agent" => RGBColor(0, 114, 178),
        "subscription" => RGBColor(230, 159, 0),
        "pgcopydb" => RGBColor(0, 158, 115),
        "pg_recvlogical" => RGBColor(150, 150, 150),
        // Variants of the agent.
        _ if number.is_multiple_of(2) => RGBColor(204, 121, 167),
        _ => RGBColor(86, 180, 233),
    }
}

/// Decoding without sending is so far ahead of everything that the rest could not be read beside it;
/// the table has it.
const NOT_DRAWN: &str = "peek";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The panels of one picture that a pass contributes.
type Theme = fn(&Pass) -> Vec<Panel>;

/// One number of a measured lag.
type LagFigure = fn(&Lag) -> f64;

/// Bars side by side, grouped.
struct Panel {
    title: String,
    unit: &'static str,
    /// Names in the legend.
    series: Vec<String>,
    /// A name and one value per series.
    groups: Vec<(String, Vec<Option<f64>>)>,
    /// A horizontal line.
    mark: Option<f64>,
}

/// Writes the pictures of all passes into a directory.
pub(crate) fn write(results: &Results, directory: &Path) -> Result<()> {
    let themes: [(&str, Theme); 3] = [("drain", drains), ("cpu", cpu), ("lag", lags)];
    for (name, panels) in themes {
        let panels: Vec<Panel> = results
            .passes
            .iter()
            .flat_map(panels)
            .filter(|panel| !panel.groups.is_empty())
            .collect();
        if !panels.is_empty() {
            let path = directory.join(format!("{name}.svg"));
            draw(&panels, &path).map_err(|error| anyhow!("draw {}: {error}", path.display()))?;
        }
    }
    Ok(())
}

fn drains(pass: &Pass) -> Vec<Panel> {
    per_network(|network| {
        let title = format!(
            "Speed of draining a backlog, subscription = 1 ({}), PostgreSQL {}",
            network_title(pass, network),
            pass.postgresql
        );
        by_workload(pass, network, title, "times as fast", Some(1.0), |drain| {
            let reference = pass.drain(&drain.workload, network, REFERENCE)?;
            Some(reference.seconds()? / drain.seconds()?)
        })
    })
}

fn cpu(pass: &Pass) -> Vec<Panel> {
    // The account is kept in hundredths of a second; a share of next to nothing says nothing.
    const LEAST: f64 = 0.2;
    let of_replica = |drain: &Drain| drain.median(|round| round.cpu_replica);
    per_network(|network| {
        let title = format!(
            "Processor time on the replica, subscription = 1 ({}), PostgreSQL {}",
            network_title(pass, network),
            pass.postgresql
        );
        by_workload(pass, network, title, "share", Some(1.0 / 3.0), |drain| {
            let reference = of_replica(pass.drain(&drain.workload, network, REFERENCE)?)?;
            (reference >= LEAST).then_some(of_replica(drain)? / reference)
        })
    })
}

fn lags(pass: &Pass) -> Vec<Panel> {
    let mut contestants: Vec<String> = Vec::new();
    for lag in &pass.lags {
        if !contestants.contains(&lag.contestant) {
            contestants.push(lag.contestant.clone());
        }
    }
    per_network(|network| {
        let of = |contestant: &String| {
            pass.lags
                .iter()
                .find(|lag| lag.network == network && lag.contestant == *contestant)
        };
        let figures: [(&str, LagFigure); 3] = [
            ("p50", |lag| lag.p50),
            ("p99", |lag| lag.p99),
            ("max", |lag| lag.max),
        ];
        Panel {
            title: format!(
                "Lag at half of the source's peak rate ({}), PostgreSQL {}",
                network_title(pass, network),
                pass.postgresql
            ),
            unit: "ms",
            groups: figures
                .iter()
                .map(|(name, figure)| {
                    let values = contestants.iter().map(of);
                    let values = values.map(|lag| Some(figure(lag?) * 1e3));
                    ((*name).to_owned(), values.collect())
                })
                .filter(|(_, values): &(String, Vec<Option<f64>>)| {
                    values.iter().any(Option::is_some)
                })
                .collect(),
            series: contestants.clone(),
            mark: (network == "wan").then_some(300.0),
        }
    })
}

fn per_network(panel: impl Fn(&str) -> Panel) -> Vec<Panel> {
    ["local", "wan"].into_iter().map(panel).collect()
}

fn network_title(pass: &Pass, network: &str) -> String {
    match network {
        "wan" => format!("{} ms round trip", pass.wan_rtt_ms),
        _ => "no distance".to_owned(),
    }
}

fn by_workload(
    pass: &Pass,
    network: &str,
    title: String,
    unit: &'static str,
    mark: Option<f64>,
    value: impl Fn(&Drain) -> Option<f64>,
) -> Panel {
    let (mut series, mut workloads): (Vec<String>, Vec<String>) = Default::default();
    for drain in pass.drains.iter().filter(|drain| drain.network == network) {
        if value(drain).is_none() || drain.contestant == NOT_DRAWN {
            continue;
        }
        if !series.contains(&drain.contestant) {
            series.push(drain.contestant.clone());
        }
        if !workloads.contains(&drain.workload) {
            workloads.push(drain.workload.clone());
        }
    }
    let groups = workloads
        .into_iter()
        .map(|workload| {
            let of = |contestant: &String| value(pass.drain(&workload, network, contestant)?);
            let values = series.iter().map(of).collect();
            (workload, values)
        })
        .collect();
    Panel {
        title,
        unit,
        series,
        groups,
        mark,
    }
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(panels: &[Panel], path: &Path) -> Drawn {
    const WIDTH: u32 = 1300;
    const HEIGHT: u32 = 360;
    let root = SVGBackend::new(path, (WIDTH, HEIGHT * panels.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
        draw_panel(area, panel)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(area: &Area<'_>, panel: &Panel) -> Drawn {
    let values = panel.groups.iter().flat_map(|(_, values)| values).flatten();
    let highest = values.chain(&panel.mark).copied().fold(0.0, f64::max);
    let groups = panel.groups.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(60)
        // The legend is right of the bars.
        .build_cartesian_2d(0.0..groups * 1.17, 0.0..highest * 1.1)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .y_desc(panel.unit)
        .y_label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .draw()?;

    // A fifth of each group's width is the gap to the next.
    let width = 0.8 / panel.series.len().max(1) as f64;
    for (number, name) in panel.series.iter().enumerate() {
        let colour = colour(name, number);
        let bars = panel
            .groups
            .iter()
            .enumerate()
            .filter_map(|(group, (_, values))| {
                let value = values.get(number).copied().flatten()?;
                let left = group as f64 + 0.1 + number as f64 * width;
                let corners = [(left, 0.0), (left + width * 0.9, value)];
                Some(Rectangle::new(corners, colour.filled()))
            });
        chart
            .draw_series(bars)?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        let centred = (FONT, 11)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Bottom));
        chart.draw_series(
            panel
                .groups
                .iter()
                .enumerate()
                .filter_map(|(group, (_, values))| {
                    let value = values.get(number).copied().flatten()?;
                    let middle = group as f64 + 0.1 + (number as f64 + 0.45) * width;
                    Some(Text::new(shown(value), (middle, value), centred.clone()))
                }),
        )?;
    }
    if let Some(mark) = panel.mark {
        let ends = [(0.0, mark), (groups, mark)];
        chart.draw_series(LineSeries::new(ends, BLACK.mix(0.5)))?;
    }
    for (group, (name, _)) in panel.groups.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.0));
        let (left, top) = area.get_base_pixel();
        let style = (FONT, 14)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Top));
        area.draw(&Text::new(name.clone(), (x - left, y - top + 8), style))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()?;
    Ok(())
}

/// Two digits that say something.
fn shown(value: f64) -> String {
    let digits = match value {
        value if value >= 10.0 => 0,
        value if value >= 1.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}
