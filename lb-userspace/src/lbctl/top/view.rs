//! Draws `lbctl top`.

use super::model::{Page, Row, Top};
use crate::{
    desired::model::{BackendState, Health},
    lbctl::render::units,
    printable::escape,
    serve::api::types::{BackendInfo, ServiceInfo},
};
use ratatui::{
    Frame,
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Clear, Paragraph, Table, TableState},
};

/// Height from which drops have a line of their own.
const TALL: u16 = 16;
/// Width of a sparkline.
const SPARK: usize = 10;

/// The text of a screen, without styles and trailing spaces.
pub fn text(buffer: &Buffer) -> String {
    let area = buffer.area;
    let line = |y| {
        let cells = (area.left()..area.right()).map(|x| buffer[(x, y)].symbol());
        cells.collect::<String>().trim_end().to_owned()
    };
    let lines: Vec<String> = (area.top()..area.bottom()).map(line).collect();
    lines.join("\n").trim_end().to_owned() + "\n"
}

/// Draws the screen.
pub fn draw(frame: &mut Frame<'_>, top: &mut Top) {
    let area = frame.area();
    let extra = u16::from(area.height >= TALL);
    let [head, problem, body, drops, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(extra),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(heading(top)), head);
    frame.render_widget(Paragraph::new(trouble(top)), problem);
    table(frame, top, body);
    if extra > 0 {
        frame.render_widget(Paragraph::new(drops_line(top)), drops);
    }
    frame.render_widget(Paragraph::new(footer(top)), foot);
    if top.is_help {
        help(frame, area);
    }
}

fn bold(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().add_modifier(Modifier::BOLD))
}

fn red(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().fg(Color::Red))
}

/// Three lines: the daemon, what it balances, and the sums.
fn heading(top: &Top) -> Vec<Line<'static>> {
    let Some(sample) = &top.sample else { return Vec::new() };
    let s = &sample.status;
    let healthy =
        if s.healthy { Span::styled("healthy", Style::new().fg(Color::Green)) } else { red("unhealthy") };
    let paused = if top.is_paused() { "  PAUSED" } else { "" };
    let up = units::span(s.uptime_s);
    let first = vec![
        bold(format!("lbd {}", s.version)),
        Span::raw(format!("  up {up}  revision {}  ", s.revision.number)),
        healthy,
        bold(paused),
    ];
    let b = &s.backends;
    let total = top.total().map_or_else(String::new, |t| {
        let (flows, packets, bytes) =
            (units::rate(t.flows), units::rate(t.packets), units::bit_rate(t.bytes));
        format!("all services: {flows} new flows/s, {packets} packets/s, {bytes}")
    });
    let many = |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
    let mut counts = format!("{}  {}", many(s.services, "service"), many(b.total, "backend"));
    for (n, what) in [(b.unhealthy, "unhealthy"), (b.draining, "draining"), (b.down, "down")] {
        if n > 0 {
            counts.push_str(&format!(", {n} {what}"));
        }
    }
    vec![Line::from(first), Line::from(counts), Line::from(total)]
}

/// The error of the last reading, or the first problem of status.
fn trouble(top: &Top) -> Line<'static> {
    if let Some(error) = &top.error {
        return Line::from(red(format!("! {}", escape(error))));
    }
    let problems = top.sample.iter().flat_map(|s| &s.status.problems);
    let more = problems.clone().count().saturating_sub(1);
    match problems.clone().next() {
        None => Line::default(),
        Some(first) if more > 0 => Line::from(red(format!("! ({more} more) {}", escape(first)))),
        Some(first) => Line::from(red(format!("! {}", escape(first)))),
    }
}

fn drops_line(top: &Top) -> Line<'static> {
    let drops = top.drops();
    if drops.is_empty() {
        return Line::from(Span::styled("no drops", Style::new().add_modifier(Modifier::DIM)));
    }
    let all: Vec<String> =
        drops.iter().take(4).map(|(reason, rate)| format!("{reason} {}/s", units::rate(*rate))).collect();
    let more = if drops.len() > all.len() { ", ..." } else { "" };
    Line::from(red(format!("drops: {}{more}", all.join(", "))))
}

fn footer(top: &Top) -> Line<'static> {
    if top.is_editing {
        return Line::from(vec![bold("filter: "), Span::raw(format!("{}_", escape(&top.filter)))]);
    }
    let place = match top.page() {
        Page::Services => "Enter backends  d drops",
        Page::Backends(_) => "Esc services  d drops",
        Page::Reasons => "Esc services",
    };
    let reversed = if top.reversed { " (reversed)" } else { "" };
    let mut text =
        format!("q quit  ? help  {place}  / filter  s sort: {}{reversed}  p pause", top.sort.label());
    if !top.filter.is_empty() {
        text = format!("filter {:?}  Esc clear  {text}", top.filter);
    }
    Line::from(Span::styled(text, Style::new().add_modifier(Modifier::REVERSED)))
}

/// A row of block characters: the last values, as parts of the largest.
pub fn sparkline(history: &[u64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &history[history.len().saturating_sub(width)..];
    let most = shown.iter().copied().max().unwrap_or(0);
    let block = |&n: &u64| match (n, most) {
        (0, _) => '▁',
        (n, most) => BLOCKS[usize::try_from((n * 7).div_ceil(most)).unwrap_or(7).min(7)],
    };
    shown.iter().map(block).collect()
}

/// One cell: text and style.
type Text = (String, Style);

fn plain(text: impl ToString) -> Text {
    (escape(&text.to_string()).into_owned(), Style::new())
}

fn coloured(text: impl ToString, colour: Color) -> Text {
    (escape(&text.to_string()).into_owned(), Style::new().fg(colour))
}

/// Rates of a row: new flows, packets, bits.
fn rate_cells(row: &Row) -> [Text; 3] {
    match row.rates {
        None => [plain("-"), plain("-"), plain("-")],
        Some(r) => {
            [plain(units::rate(r.flows)), plain(units::rate(r.packets)), plain(units::bit_rate(r.bytes))]
        }
    }
}

fn load_cell(row: &Row) -> Text {
    match row.load {
        None => plain("-"),
        Some((running, 0)) => plain(running),
        Some((running, waiting)) => coloured(format!("{running}+{waiting}"), Color::Yellow),
    }
}

fn service_cells(row: &Row, s: &ServiceInfo) -> Vec<Text> {
    let (eligible, all) = (s.status.eligible, s.spec.backends.len());
    let colour = match eligible {
        0 => Color::Red,
        n if n < all => Color::Yellow,
        _ => Color::Green,
    };
    let mut note = Vec::new();
    let draining = s.spec.backends.values().filter(|b| b.state == BackendState::Draining).count();
    if s.status.panic {
        note.push("panic".to_owned());
    }
    if draining > 0 {
        note.push(format!("{draining} draining"));
    }
    if s.status.transition_slots > 0 {
        note.push("moving".to_owned());
    }
    let [flows, packets, bits] = rate_cells(row);
    let up = coloured(format!("{eligible}/{all}"), colour);
    vec![
        plain(&s.name),
        up,
        flows,
        packets,
        bits,
        load_cell(row),
        plain(sparkline(&row.history, SPARK)),
        plain(note.join(", ")),
    ]
}

fn backend_cells(row: &Row, b: &BackendInfo) -> Vec<Text> {
    let status = &b.status;
    let health = match (status.health, b.spec.state) {
        (_, BackendState::Down) => coloured("down", Color::DarkGray),
        (_, BackendState::Draining) => coloured("draining", Color::Yellow),
        (Health::Unhealthy, _) => coloured("unhealthy", Color::Red),
        (Health::Unknown, _) => coloured("unknown", Color::Yellow),
        (Health::Healthy, _) if status.unchecked && status.unreachable.is_some() => {
            coloured("unreachable", Color::Red)
        }
        (Health::Healthy, _) if status.unchecked => plain("unchecked"),
        (Health::Healthy, _) => coloured("healthy", Color::Green),
    };
    let note = match (&status.drain, &status.excluded, &status.last_probe) {
        (Some(drain), ..) => format!("{} flows, {}", drain.flows_left, units::span(drain.deadline_s)),
        (None, Some(why), _) => why.clone(),
        (None, None, Some(probe)) if !probe.ok => probe.reason.clone(),
        _ => String::new(),
    };
    let [flows, packets, bits] = rate_cells(row);
    vec![
        plain(&b.name),
        health,
        flows,
        packets,
        bits,
        load_cell(row),
        plain(sparkline(&row.history, SPARK)),
        plain(note),
    ]
}

/// Headings, widths and cells of the page's rows. A heading that starts with `>` is aligned to the right.
fn cells(top: &Top, rows: &[Row]) -> (Vec<&'static str>, Vec<Constraint>, Vec<Vec<Text>>) {
    use Constraint::{Fill, Length, Min};
    let Some(sample) = &top.sample else { return Default::default() };
    let mixed = |name, health, width| {
        let headings = vec![name, health, ">FLOWS/S", ">PKT/S", ">RATE", ">LOAD", "HISTORY", "NOTE"];
        let widths =
            vec![Min(14), Length(width), Length(7), Length(7), Length(12), Length(7), Length(10), Fill(1)];
        (headings, widths)
    };
    match top.page() {
        Page::Services => {
            let (headings, widths) = mixed("SERVICE", "UP", 5);
            let find = |row: &Row| sample.services.iter().find(|s| s.name.as_str() == row.key.0);
            let cells = rows.iter().filter_map(|row| Some(service_cells(row, find(row)?)));
            (headings, widths, cells.collect())
        }
        Page::Backends(_) => {
            let (headings, widths) = mixed("BACKEND", "HEALTH", 9);
            let find = |row: &Row| sample.backends.iter().find(|b| b.name.as_str() == row.key.1);
            let cells = rows.iter().filter_map(|row| Some(backend_cells(row, find(row)?)));
            (headings, widths, cells.collect())
        }
        Page::Reasons => {
            let headings = vec!["REASON", "FATE", ">PKT/S", ">PACKETS", "HISTORY", "MEANING"];
            let widths = vec![Length(18), Length(6), Length(7), Length(12), Length(10), Fill(1)];
            let cells = rows.iter().filter_map(|row| {
                let reason = sample.stats.reasons.iter().find(|r| r.reason == row.key.0)?;
                let colour = if reason.fate == "drop" { Color::Red } else { Color::Reset };
                Some(vec![
                    coloured(&reason.reason, colour),
                    plain(&reason.fate),
                    rate_cells(row)[1].clone(),
                    plain(reason.packets),
                    plain(sparkline(&row.history, SPARK)),
                    plain(&reason.about),
                ])
            });
            (headings, widths, cells.collect())
        }
    }
}

fn table(frame: &mut Frame<'_>, top: &mut Top, area: Rect) {
    let rows = top.rows();
    let (mut headings, mut widths, mut cells) = cells(top, &rows);
    // A narrow screen does without the last columns.
    let columns = match area.width {
        0..45 => 4,
        45..66 => 5,
        66..78 => 7,
        _ => headings.len(),
    };
    headings.truncate(columns);
    widths.truncate(columns);
    cells.iter_mut().for_each(|row| row.truncate(columns));
    top.height = usize::from(area.height.saturating_sub(1)).max(1);
    let is_right: Vec<bool> = headings.iter().map(|h| h.starts_with('>')).collect();
    let cell = |i: usize, (text, style): Text| {
        let line =
            if is_right.get(i) == Some(&true) { Line::from(text).right_aligned() } else { Line::from(text) };
        Cell::from(line).style(style)
    };
    let title = |(i, heading): (usize, &&str)| cell(i, plain(heading.trim_start_matches('>')));
    let header = ratatui::widgets::Row::new(headings.iter().enumerate().map(title))
        .style(Style::new().add_modifier(Modifier::BOLD));
    let all = cells
        .into_iter()
        .map(|row| ratatui::widgets::Row::new(row.into_iter().enumerate().map(|(i, text)| cell(i, text))));
    let table = Table::new(all, widths)
        .header(header)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::default().with_selected((!rows.is_empty()).then_some(top.selected));
    if rows.is_empty() {
        let what =
            if top.filter.is_empty() { "nothing to show yet" } else { "nothing contains the filter's text" };
        frame.render_widget(Paragraph::new(what), area);
        return;
    }
    frame.render_stateful_widget(table, area, &mut state);
}

/// Explains the keys, over the screen.
fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines = [
        "Up Down PgUp PgDn   select a row",
        "Enter               backends of the selected service",
        "Esc                 clear the filter; back to the services",
        "d                   packets that were not simply forwarded, by reason",
        "/                   show only rows with this text in name or address",
        "s, r                sort by the next column; reverse the order",
        "p                   pause",
        "q, Ctrl-C           quit",
        "",
        "UP    backends that take new flows, of all; HISTORY is of packets",
        "LOAD  requests that replicas run, and +waiting; - without reports",
        "A rate is the mean since the last sample.  Any key closes this.",
    ];
    let height = (lines.len() as u16 + 2).min(area.height);
    let width = 72.min(area.width);
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let text: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
    let block = ratatui::widgets::Block::bordered().title("Keys");
    frame.render_widget(Paragraph::new(text).block(block), place);
}
