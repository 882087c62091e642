//! Tables for people: aligned text on a terminal, Markdown for documents.
//!
//! Colour is used only on a terminal and never with `NO_COLOR` set.

use std::io::IsTerminal;

/// How good a cell is; decides its colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it comes.
    #[default]
    Plain,
    /// Green.
    Good,
    /// Yellow.
    Warn,
    /// Red.
    Bad,
    /// Grey.
    Dim,
    /// Bold.
    Strong,
}

/// One cell.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
    right: bool,
}

/// Rows of cells under headings.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    head: Vec<Cell>,
    rows: Vec<Vec<Cell>>,
}

/// Whether to paint, decided once per stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(bool);

/// Text, aligned left.
pub(crate) fn text(text: impl Into<String>) -> Cell {
    Cell { text: text.into(), ..Cell::default() }
}

/// A number, aligned right.
pub(crate) fn number(text: impl Into<String>) -> Cell {
    Cell { text: text.into(), right: true, ..Cell::default() }
}

impl Cell {
    /// The same in another tone.
    pub(crate) fn tone(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }
}

impl Table {
    /// With these headings; their alignment is that of the first row's cells.
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { head: head.into_iter().map(text).collect(), rows: Vec::new() }
    }

    /// Appends a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Aligned text, one line per row.
    pub(crate) fn render(&self, paint: Paint) -> String {
        let columns = self.head.len();
        let width = |c: usize| {
            self.all().filter_map(|r| r.get(c)).map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for (i, row) in self.all().enumerate() {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate().take(columns) {
                let pad = widths[c].saturating_sub(cell.text.chars().count());
                let right = if i == 0 { self.column_is_right(c) } else { cell.right };
                let tone = if i == 0 { Tone::Strong } else { cell.tone };
                let painted = paint.paint(tone, &cell.text);
                if c > 0 {
                    line.push_str("  ");
                }
                if right {
                    line.push_str(&" ".repeat(pad));
                    line.push_str(&painted);
                } else {
                    line.push_str(&painted);
                    if c + 1 < columns {
                        line.push_str(&" ".repeat(pad));
                    }
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    /// A Markdown table.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        let line = |cells: &[Cell]| {
            let cells: Vec<String> = cells.iter().map(|c| c.text.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        out.push_str(&line(&self.head));
        let rule: Vec<&str> =
            (0..self.head.len()).map(|c| if self.column_is_right(c) { "---:" } else { "---" }).collect();
        out += &["| ", &rule.join(" | "), " |\n"].concat();
        self.rows.iter().for_each(|r| out.push_str(&line(r)));
        out
    }

    fn all(&self) -> impl Iterator<Item = &Vec<Cell>> {
        std::iter::once(&self.head).chain(&self.rows)
    }

    fn column_is_right(&self, c: usize) -> bool {
        self.rows.first().and_then(|r| r.get(c)).is_some_and(|cell| cell.right)
    }
}

impl Paint {
    /// For standard output.
    pub(crate) fn stdout() -> Self {
        Self(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
    }

    /// `text` in `tone`.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
            Tone::Strong => "1",
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_markdown_escapes() {
        let mut t = Table::new(["name", "GB/s"]);
        t.row([text("shm"), number("9.10")]);
        t.row([text("a|b").tone(Tone::Good), number("10.25")]);
        assert_eq!(t.render(Paint(false)), "name   GB/s\nshm    9.10\na|b   10.25\n");
        assert_eq!(t.markdown(), "| name | GB/s |\n| --- | ---: |\n| shm | 9.10 |\n| a\\|b | 10.25 |\n");
        assert!(t.render(Paint(true)).contains("\x1b[32ma|b\x1b[0m"));
    }
}
