//! Aligned columns of text.

/// Rows whose cells line up. The last column is never padded.
pub(in crate::cli) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Without a heading.
    pub(in crate::cli) fn plain() -> Self {
        Self { rows: Vec::new() }
    }

    /// With a heading.
    pub(in crate::cli) fn headed<const N: usize>(heading: [&str; N]) -> Self {
        let mut table = Self::plain();
        table.row(heading);
        table
    }

    pub(in crate::cli) fn row<const N: usize>(&mut self, cells: [&str; N]) {
        self.rows.push(cells.map(str::to_owned).to_vec());
    }

    pub(in crate::cli) fn print(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}
