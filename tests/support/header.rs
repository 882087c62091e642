//! Reads `include/kvxfer.h` far enough to make tests from it: functions with their parameters, handles and constants.

/// The repository.
pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What the header declares.
pub(crate) struct Header {
    /// Every function, in order.
    pub(crate) functions: Vec<Function>,
    /// Names of the opaque types.
    pub(crate) handles: Vec<String>,
    /// `#define`s with a value.
    pub(crate) constants: Vec<(String, String)>,
}

/// One declaration.
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// What it returns.
    pub(crate) returns: String,
    /// Types and names of its parameters.
    pub(crate) parameters: Vec<(String, String)>,
    /// The comment above it.
    pub(crate) doc: String,
}

impl Header {
    /// Reads the checked-in header.
    pub(crate) fn read() -> Self {
        let text = std::fs::read_to_string(format!("{ROOT}/include/kvxfer.h")).expect("include/kvxfer.h");
        let mut header = Self { functions: Vec::new(), handles: Vec::new(), constants: Vec::new() };
        let (mut doc, mut pending) = (String::new(), String::new());
        let mut in_block = false;
        for line in text.lines() {
            let line = line.trim_end();
            if in_block || line.starts_with("/*") {
                in_block = !line.ends_with("*/");
                continue;
            }
            if let Some(comment) = line.strip_prefix("//") {
                doc.push_str(comment);
                doc.push('\n');
                continue;
            }
            if let Some(define) = line.strip_prefix("#define ") {
                if let Some((name, value)) = define.split_once(' ') {
                    header.constants.push((name.to_owned(), value.trim().to_owned()));
                }
            } else if let Some(handle) =
                line.strip_prefix("typedef struct ").filter(|rest| rest.ends_with(';') && !rest.contains('('))
            {
                header.handles.push(handle.split(' ').next().unwrap_or_default().to_owned());
            } else if pending.is_empty()
                && (line.contains(" kvxfer_") || line.contains("*kvxfer_"))
                && line.contains('(')
                && !line.starts_with([' ', '}'])
                && !line.starts_with("typedef")
            {
                line.clone_into(&mut pending);
            } else if !pending.is_empty() {
                pending.push(' ');
                pending.push_str(line.trim());
            }
            if pending.ends_with(';') {
                header
                    .functions
                    .push(Function::parse(&std::mem::take(&mut pending), std::mem::take(&mut doc)));
            }
            if pending.is_empty() {
                doc.clear();
            }
        }
        header
    }
}

impl Function {
    fn parse(text: &str, doc: String) -> Self {
        let (head, rest) = text.split_once('(').expect("a parameter list");
        let (returns, name) = split_name(head);
        let parameters = rest
            .trim_end_matches([';', ')', ' '])
            .split(',')
            .map(str::trim)
            .filter(|p| !p.is_empty() && *p != "void")
            .map(split_name)
            .collect();
        Self { name, returns, parameters, doc }
    }
}

/// Splits `const char *const *name` into type and name.
fn split_name(text: &str) -> (String, String) {
    let at = text.rfind([' ', '*']).map_or(0, |i| i + 1);
    let kind = text[..at].replace("struct ", "");
    (kind.split_whitespace().collect::<Vec<_>>().join(" "), text[at..].to_owned())
}
