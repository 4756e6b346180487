//! A table of shares as an SVG picture: the darker a cell, the larger its share.
//!
//! One hue, so that it is read without colour vision, and in each cell its figure. The same cells give the same bytes.

use super::board::replace_file;
use super::plot::{LEFT, RIGHT, STYLE, TOP, WIDTH, escaped, label, push};
use anyhow::Result;
use std::path::Path;

const ROW: f64 = 40.0;
const BELOW: f64 = 56.0;
/// The colour of 1; 0 is white.
const FULL: [f64; 3] = [11.0, 83.0, 148.0];
/// From here on black figures are hard to read.
const DARK: f64 = 0.55;

/// A picture of shares.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeatMap {
    /// Above it.
    pub title: String,
    /// Below it.
    pub x_label: String,
    /// Beside it.
    pub y_label: String,
    /// Under each column.
    pub columns: Vec<String>,
    /// Before each row.
    pub rows: Vec<String>,
    /// `cells[row][column]`, from 0 to 1.
    pub cells: Vec<Vec<f64>>,
}

impl HeatMap {
    /// Writes the picture.
    pub fn write(&self, path: &Path) -> Result<()> {
        replace_file(path, self.to_svg().as_bytes())
    }

    /// The picture.
    pub fn to_svg(&self) -> String {
        let (right, bottom) = (WIDTH - RIGHT, TOP + ROW * self.rows.len() as f64);
        let height = bottom + BELOW;
        let wide = (right - LEFT) / self.columns.len().max(1) as f64;
        let mut svg = String::new();
        push(
            &mut svg,
            format_args!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {STYLE}>"#
            ),
        );
        push(&mut svg, format_args!("<title>{}</title>", escaped(&self.title)));
        push(
            &mut svg,
            format_args!(r##"<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>"##),
        );
        label(&mut svg, (LEFT, 20.0), r#"font-size="15""#, &self.title);
        for (row, (name, cells)) in self.rows.iter().zip(&self.cells).enumerate() {
            let y = TOP + ROW * row as f64;
            let middle = y + ROW / 2.0 + 4.0;
            label(&mut svg, (LEFT - 8.0, middle), r#"text-anchor="end""#, name);
            for (column, share) in cells.iter().take(self.columns.len()).enumerate() {
                cell(&mut svg, (LEFT + wide * column as f64, y), wide, *share);
            }
        }
        for (column, name) in self.columns.iter().enumerate() {
            let x = LEFT + wide * (column as f64 + 0.5);
            label(&mut svg, (x, bottom + 20.0), r#"text-anchor="middle""#, name);
        }
        let middle = ((LEFT + right) / 2.0, height - 12.0);
        label(&mut svg, middle, r#"text-anchor="middle""#, &self.x_label);
        let middle = (TOP + bottom) / 2.0;
        let upright = format!(r#"text-anchor="middle" transform="rotate(-90 16 {middle})""#);
        label(&mut svg, (16.0, middle), &upright, &self.y_label);
        svg.push_str("</svg>\n");
        svg
    }
}

fn cell(svg: &mut String, at: (f64, f64), wide: f64, share: f64) {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let [red, green, blue] = FULL.map(|full| (255.0 + (full - 255.0) * share).round() as u8);
    push(
        svg,
        format_args!(
            r##"<rect x="{:.1}" y="{:.1}" width="{wide:.1}" height="{ROW}" fill="#{red:02x}{green:02x}{blue:02x}" stroke="#ffffff"/>"##,
            at.0, at.1
        ),
    );
    let colour = if share < DARK { "#222222" } else { "#ffffff" };
    let attributes = format!(r#"text-anchor="middle" fill="{colour}""#);
    let middle = (at.0 + wide / 2.0, at.1 + ROW / 2.0 + 4.0);
    label(svg, middle, &attributes, &format!("{:.0} %", 100.0 * share));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::plot::tests::{check_well_formed, numbers_of};

    fn map(columns: usize, cells: Vec<Vec<f64>>) -> HeatMap {
        HeatMap {
            title: "<needles> & \"hay\"".to_string(),
            columns: (0..columns).map(|column| format!("{}", 64 << column)).collect(),
            rows: (0..cells.len()).map(|row| format!("{row} %")).collect(),
            cells,
            ..HeatMap::default()
        }
    }

    #[test]
    fn a_picture_is_well_formed_with_one_cell_for_each_pair_and_all_inside() {
        for (columns, rows) in [(0, 0), (1, 1), (4, 5), (9, 11)] {
            let share = |row: usize| (0..columns).map(|c| (row + c) as f64 / 20.0).collect();
            let map = map(columns, (0..rows).map(share).collect());
            let svg = map.to_svg();
            check_well_formed(&svg);
            assert_eq!(svg.matches("stroke=\"#ffffff\"").count(), columns * rows, "{svg}");
            let height = TOP + ROW * rows as f64 + BELOW;
            let inside = |attribute, limit| {
                assert!(
                    numbers_of(&svg, attribute).iter().all(|n| (0.0..=limit).contains(n)),
                    "{svg}"
                );
            };
            inside(" x", WIDTH - RIGHT);
            inside(" y", height);
        }
    }

    #[test]
    fn a_larger_share_is_darker_and_says_its_figure_whatever_it_is() {
        let svg = map(5, vec![vec![0.0, 0.5, 1.0, f64::NAN, 7.0]]).to_svg();
        check_well_formed(&svg);
        let fills: Vec<&str> = svg
            .lines()
            .filter(|line| line.contains("stroke="))
            .filter_map(|line| line.split("fill=\"").nth(1)?.split('"').next())
            .collect();
        assert_eq!(fills, ["#ffffff", "#85a9ca", "#0b5394", "#ffffff", "#0b5394"]);
        for figure in [">0 %<", ">50 %<", ">100 %<"] {
            assert!(svg.contains(figure), "{svg}");
        }
    }
}
