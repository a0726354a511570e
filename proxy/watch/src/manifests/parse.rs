//! Text of a file to the objects in it.

use std::path::Path;

use serde_json::Value;

/// Why a file cannot be read, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ParseError {
    pub(super) line: Option<u64>,
    pub(super) message: String,
}

/// More events than any folder of manifests has. The parser's own limit is for configuration
/// files; its limits on aliases, which guard against blow-up, stay.
const MOST_EVENTS: usize = 500_000_000;

/// All objects of a file, lists taken apart.
pub(super) fn objects(path: &Path, text: &str) -> Result<Vec<Value>, ParseError> {
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let documents = if json { json_documents(text) } else { yaml_documents(text) }?;
    let mut objects = Vec::with_capacity(documents.len());
    for document in documents {
        flatten(document, &mut objects);
    }
    Ok(objects)
}

fn json_documents(text: &str) -> Result<Vec<Value>, ParseError> {
    let documents = serde_json::Deserializer::from_str(text).into_iter();
    documents
        .collect::<Result<_, serde_json::Error>>()
        .map_err(|e| ParseError { line: u64::try_from(e.line()).ok(), message: e.to_string() })
}

fn yaml_documents(text: &str) -> Result<Vec<Value>, ParseError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: MOST_EVENTS,
            max_nodes: MOST_EVENTS,
            max_documents: MOST_EVENTS,
            max_total_scalar_bytes: usize::MAX,
        },
        // `key: 010` is text to nobody but is read as 8 by YAML 1.1 and 10 by 1.2: keep it as it
        // is, so that the field's own type decides.
        leading_zero_numbers_as_strings: true,
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|e| ParseError {
        line: e.location().map(|l| l.line()).filter(|line| *line > 0),
        message: e.to_string(),
    })
}

/// `kind: List` and `ServiceList`: items of a typed list may lack their own kind.
fn flatten(document: Value, objects: &mut Vec<Value>) {
    let Value::Object(mut document) = document else {
        if !document.is_null() {
            objects.push(document);
        }
        return;
    };
    let text = |document: &serde_json::Map<String, Value>, key: &str| {
        document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let kind = text(&document, "kind");
    let Some(item_kind) = kind.strip_suffix("List") else {
        objects.push(Value::Object(document));
        return;
    };
    let Some(Value::Array(items)) = document.remove("items") else {
        return;
    };
    let version = text(&document, "apiVersion");
    for mut item in items {
        if let Value::Object(item) = &mut item
            && !item_kind.is_empty()
        {
            item.entry("kind").or_insert_with(|| item_kind.into());
            item.entry("apiVersion").or_insert_with(|| version.clone().into());
        }
        flatten(item, objects);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(file: &str, text: &str) -> Vec<String> {
        let objects = objects(Path::new(file), text).unwrap();
        let name = |o: &Value| {
            format!("{}/{}", o["kind"].as_str().unwrap_or("?"), o["metadata"]["name"].as_str().unwrap_or("?"))
        };
        objects.iter().map(name).collect()
    }

    #[test]
    fn documents_and_lists_come_apart() {
        let yaml = "# nothing\n---\nkind: Service\nmetadata: {name: a}\n---\n---\nkind: List\napiVersion: v1\nitems:\n- kind: Service\n  metadata: {name: b}\n- kind: Node\n  metadata: {name: c}\n---\nkind: ServiceList\napiVersion: v1\nitems:\n- metadata: {name: d}\n...\n";
        assert_eq!(names("x.yaml", yaml), ["Service/a", "Service/b", "Node/c", "Service/d"]);
        let json = r#"{"kind":"List","items":[{"kind":"Service","metadata":{"name":"a"}}]}
            {"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","items":[{"metadata":{"name":"b"}}]}"#;
        assert_eq!(names("x.JSON", json), ["Service/a", "EndpointSlice/b"]);
        assert_eq!(names("x.yml", json.lines().next().unwrap()), ["Service/a"], "JSON is YAML, too");
        assert_eq!(names("x.yaml", ""), Vec::<String>::new());
        assert_eq!(names("x.json", ""), Vec::<String>::new());
        assert_eq!(names("x.yaml", "kind: List\nitems: null\n"), Vec::<String>::new());
    }

    #[test]
    fn scalars_keep_what_kubernetes_means() {
        let yaml =
            "a: 010.0.0.1\nb: 2026-01-01T00:00:00Z\nc: ::1\nd: \"80\"\ne: 80\nf: 0755\ng: yes\nh: 1_000\n";
        let object = &objects(Path::new("x.yaml"), yaml).unwrap()[0];
        assert_eq!(
            *object,
            serde_json::json!({"a": "010.0.0.1", "b": "2026-01-01T00:00:00Z", "c": "::1", "d": "80", "e": 80,
                "f": "0755", "g": object["g"], "h": object["h"]})
        );
    }

    #[test]
    fn anchors_are_followed() {
        let yaml = "kind: Service\nmetadata: &m {name: a}\n---\nkind: Service\nx: &y [1]\nmetadata: {name: b}\nz: *y\n";
        assert_eq!(names("x.yaml", yaml), ["Service/a", "Service/b"]);
    }

    #[test]
    fn errors_name_the_line() {
        let error =
            objects(Path::new("x.yaml"), "kind: Service\nmetadata:\n  name: [a\nspec: {}\n").unwrap_err();
        assert!(error.line.is_some_and(|line| line >= 3), "{error:?}");
        let error = objects(Path::new("x.json"), "{\n\n \"a\": }").unwrap_err();
        assert_eq!(error.line, Some(3));
    }

    #[test]
    fn a_large_file_is_no_attack() {
        let one = "---\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {clusterIP: 10.0.0.1, ports: [{port: 80}, {port: 443}]}\n";
        assert_eq!(objects(Path::new("x.yaml"), &one.repeat(20_000)).unwrap().len(), 20_000);
    }
}
