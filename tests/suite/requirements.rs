//! docs/requirements.md against the tree: every test that it names exists, and no number is missing.

use std::path::PathBuf;

/// A row of a table: its number, and the cell that says what holds it.
struct Row<'a> {
    number: u32,
    held_by: &'a str,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn page() -> String {
    std::fs::read_to_string(root().join("docs/requirements.md")).unwrap()
}

fn rows(text: &str) -> Vec<Row<'_>> {
    let row = |line| {
        let cells: Vec<&str> =
            str::strip_prefix(line, "| ")?.strip_suffix(" |")?.split(" | ").collect();
        let number = cells[0].parse().ok()?;
        assert_eq!(cells.len(), 3, "{line}");
        Some(Row { number, held_by: cells[2] })
    };
    text.lines().filter_map(row).collect()
}

/// Why the test of this path does not exist, if so: paths name files (see the page's head), and the file must hold
/// a function of that name under `#[test]`, or one of a `proptest!` block.
fn missing(path: &str) -> Option<String> {
    let (module, name) = path.rsplit_once("::")?;
    let folders = [
        ("kernels::suite::", "kernels/tests/suite/"),
        ("kernels::", "kernels/src/"),
        ("suite::", "tests/suite/"),
    ];
    let place = |(prefix, folder): &(&str, &str)| {
        module.strip_prefix(prefix).map(|rest| format!("{folder}{}.rs", rest.replace("::", "/")))
    };
    let file = folders.iter().find_map(place);
    let file = file.unwrap_or_else(|| format!("src/{}.rs", module.replace("::", "/")));
    let Ok(text) = std::fs::read_to_string(root().join(&file)) else {
        return Some(format!("{path}: no file {file}"));
    };
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        let rest = line.strip_prefix("fn ").and_then(|line| line.strip_prefix(name));
        if is_test && rest.is_some_and(|rest| rest.starts_with('(')) {
            return None;
        }
        is_test = line == "#[test]" || is_test && line.starts_with("#[");
    }
    Some(format!("{path}: no test of that name in {file}"))
}

#[test]
fn every_requirement_names_tests_that_exist_or_a_reason() {
    let page = page();
    let mut faults = Vec::new();
    for Row { number, held_by } in rows(&page) {
        let tests: Vec<&str> = held_by.split('`').skip(1).step_by(2).collect();
        let has_reason = held_by.strip_prefix("not held: ").is_some_and(|reason| reason.len() > 10);
        if tests.is_empty() != has_reason {
            faults.push(format!("{number}: needs tests or a reason, and not both: {held_by}"));
        }
        faults.extend(
            tests.iter().filter_map(|path| missing(path)).map(|text| format!("{number}: {text}")),
        );
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn no_number_of_the_first_table_is_missing_or_stands_twice() {
    let page = page();
    let (_, after) = page.split_once("<!-- complete: ").expect("a mark of the complete table");
    let (numbers, table) = after.split_once(" -->").unwrap();
    let mut wanted = Vec::new();
    for range in numbers.split(' ') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        wanted.extend(first.parse::<u32>().unwrap()..=last.parse().unwrap());
    }
    let table = table.split("\n## ").next().unwrap();
    let found: Vec<u32> = rows(table).iter().map(|row| row.number).collect();
    assert_eq!(found, wanted);
    assert_eq!(wanted.len(), 46 + 1 + 3 + 8 + 8);
}
