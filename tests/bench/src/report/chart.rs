//! Charts as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 400);
const FONT: &str = "sans-serif";
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 98, 168),
    RGBColor(214, 106, 26),
    RGBColor(44, 132, 74),
    RGBColor(150, 60, 140),
    RGBColor(170, 40, 45),
    RGBColor(90, 90, 90),
];

/// A line of a chart.
pub struct Line {
    /// What it shows.
    pub name: String,
    /// Its points, by rising x.
    pub points: Vec<(f64, f64)>,
}

/// A bar of a chart.
pub struct Bar {
    /// What stands below it.
    pub name: String,
    /// Its height.
    pub value: f64,
    /// Least and greatest of what was measured.
    pub range: (f64, f64),
}

/// Draws lines over a logarithmic x axis, y from zero.
pub fn lines(path: &Path, title: &str, x: &str, y: &str, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|(x, _)| *x).fold(2.0, f64::max);
    let top = points().map(|(_, y)| *y).fold(1.0, f64::max) * 1.1;
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_lines(&area, title, (x, y), (right, top), lines)
        .map_err(|error| anyhow!("draw {title}: {error}"))?;
    area.present().map_err(|error| anyhow!("write {}: {error}", path.display()))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw_lines(area: &Area<'_>, title: &str, axes: (&str, &str), end: (f64, f64), lines: &[Line]) -> Drawn {
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 18))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d((1f64..end.0).log_scale().base(2.0), 0f64..end.1)?;
    chart
        .configure_mesh()
        .x_desc(axes.0)
        .y_desc(axes.1)
        .x_label_formatter(&|x| count(*x))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))?
            .label(line.name.clone())
            .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
}

/// 1,024 as 1 K, 1,048,576 as 1 M.
fn count(x: f64) -> String {
    match x {
        x if x >= 1_048_576.0 => format!("{:.0} M", x / 1_048_576.0),
        x if x >= 1_024.0 => format!("{:.0} K", x / 1_024.0),
        x => format!("{x:.0}"),
    }
}

/// Draws bars with what they range over.
pub fn bars(path: &Path, title: &str, y: &str, bars: &[Bar]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_bars(&area, title, y, bars).map_err(|error| anyhow!("draw {title}: {error}"))?;
    area.present().map_err(|error| anyhow!("write {}: {error}", path.display()))
}

fn draw_bars(area: &Area<'_>, title: &str, y: &str, bars: &[Bar]) -> Drawn {
    area.fill(&WHITE)?;
    let top = bars.iter().map(|bar| bar.range.1.max(bar.value)).fold(f64::MIN_POSITIVE, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 18))
        .margin(14)
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0f64..bars.len() as f64, 0f64..top)?;
    let name = |x: &f64| {
        // Labels stand at the middle of their bars only.
        let place = x - 0.5;
        let bar = bars.get(place.round() as usize).filter(|_| (place - place.round()).abs() < 0.01);
        bar.map(|bar| bar.name.clone()).unwrap_or_default()
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .y_desc(y)
        .x_labels(bars.len() * 2 + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|y| if top < 20.0 { format!("{y:.1}") } else { format!("{y:.0}") })
        .light_line_style(WHITE)
        .draw()?;
    for (i, bar) in bars.iter().enumerate() {
        let (left, middle, right) = (i as f64 + 0.2, i as f64 + 0.5, i as f64 + 0.8);
        let colour = COLOURS[if bar.name.starts_with("ours") { 0 } else { 5 }];
        chart.draw_series([Rectangle::new([(left, 0.0), (right, bar.value)], colour.mix(0.8).filled())])?;
        let range = vec![(middle, bar.range.0), (middle, bar.range.1)];
        chart.draw_series([PathElement::new(range, BLACK.stroke_width(1))])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_hold_what_they_show() {
        let path = std::env::temp_dir().join(format!("bench-chart-{}.svg", std::process::id()));
        let points = vec![(1.0, 50.0), (1_024.0, 60.0)];
        lines(&path, "Title", "flows", "ns", &[Line { name: "line".into(), points }]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(["Title", "flows", "line", "polyline"].iter().all(|part| text.contains(part)), "{text}");
        let all =
            ["direct", "ours-ipip"].map(|name| Bar { name: name.into(), value: 2.0, range: (1.0, 3.0) });
        bars(&path, "Bars", "per s", &all).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(["Bars", "direct", "ours-ipip", "rect"].iter().all(|part| text.contains(part)), "{text}");
    }
}
