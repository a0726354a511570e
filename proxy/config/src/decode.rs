//! Text to configuration and back.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::shunt::ShuntConfiguration;
use crate::types::KubeProxyConfiguration;
use crate::validate::Invalid;
use crate::{API_VERSION, KIND, SHUNT_API_VERSION, SHUNT_KIND};

/// What a file says.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Loaded {
    /// kube-proxy's configuration, defaulted and valid; `None` if the file has none.
    pub kube_proxy: Option<KubeProxyConfiguration>,
    /// Our own, valid; `None` if the file has none.
    pub shunt: Option<ShuntConfiguration>,
    /// What is in the file and means nothing.
    pub warnings: Vec<String>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It is no YAML and no JSON.
    #[error("failed to decode: {0}")]
    Syntax(String),
    /// A field does not fit its type.
    #[error("failed to decode: {kind}: {field}: {message}")]
    Field {
        /// The document's kind.
        kind: &'static str,
        /// Path of the field.
        field: String,
        /// What is wrong.
        message: String,
    },
    /// A document of a version that is not known.
    #[error("no kind {kind:?} is registered for version {version:?}: want {want}")]
    Version {
        /// The document's kind.
        kind: &'static str,
        /// Its version.
        version: String,
        /// The version that is known.
        want: &'static str,
    },
    /// Two documents of one kind.
    #[error("more than one document of kind {0}")]
    Repeated(&'static str),
    /// Values that make no sense, all of them.
    #[error("{}", aggregate(.0))]
    Invalid(Vec<Invalid>),
}

/// As Go prints aggregated errors: one alone, several in brackets.
fn aggregate(errors: &[Invalid]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    match texts.as_slice() {
        [one] => one.clone(),
        _ => format!("[{}]", texts.join(", ")),
    }
}

/// Reads a file: strictly first, then leniently with warnings that name what is unknown or repeated
/// (kube-proxy's rule). YAML with any number of documents, or JSON.
pub fn decode(text: &str) -> Result<Loaded, ConfigError> {
    let mut loaded = Loaded::default();
    for document in documents(text, &mut loaded.warnings)? {
        let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, version) = (text("kind"), text("apiVersion"));
        match kind.as_str() {
            KIND => {
                if loaded.kube_proxy.is_some() {
                    return Err(ConfigError::Repeated(KIND));
                }
                if version != API_VERSION {
                    return Err(ConfigError::Version { kind: KIND, version, want: API_VERSION });
                }
                loaded.kube_proxy = Some(from_value(&document, &mut loaded.warnings)?);
            }
            SHUNT_KIND => {
                if loaded.shunt.is_some() {
                    return Err(ConfigError::Repeated(SHUNT_KIND));
                }
                if version != SHUNT_API_VERSION {
                    return Err(ConfigError::Version { kind: SHUNT_KIND, version, want: SHUNT_API_VERSION });
                }
                let known = known_fields(&ShuntConfiguration::default());
                loaded.warnings.extend(unknown(SHUNT_KIND, &document, &known));
                // As in Go, null means the same as absent.
                let mut document = document;
                if let Value::Object(fields) = &mut document {
                    fields.retain(|_, value| !value.is_null());
                }
                let shunt: ShuntConfiguration = typed(SHUNT_KIND, &document)?;
                let invalid = shunt.validate();
                if !invalid.is_empty() {
                    return Err(ConfigError::Invalid(invalid));
                }
                loaded.shunt = Some(shunt);
            }
            "" if document.is_null() => {}
            "" => return Err(ConfigError::Syntax("Object 'Kind' is missing".to_owned())),
            other => loaded.warnings.push(format!("document of kind {other:?}: ignored")),
        }
    }
    Ok(loaded)
}

/// Makes a configuration of a document that is known to be a `KubeProxyConfiguration`: unknown fields
/// become warnings, absent ones get their defaults, and the result is valid.
pub fn from_value(
    document: &Value,
    warnings: &mut Vec<String>,
) -> Result<KubeProxyConfiguration, ConfigError> {
    warnings.extend(unknown(KIND, document, &known_fields(&KubeProxyConfiguration::default())));
    let mut config: KubeProxyConfiguration = typed(KIND, document)?;
    config.set_defaults();
    let invalid = config.validate();
    if !invalid.is_empty() {
        return Err(ConfigError::Invalid(invalid));
    }
    warnings.extend(config.warnings());
    Ok(config)
}

/// Writes a configuration as kube-proxy's `--write-config-to` does: YAML, keys in order of the
/// alphabet, every field with its value.
pub fn write(config: &KubeProxyConfiguration) -> Result<String, ConfigError> {
    let failed = |error: &dyn std::fmt::Display| ConfigError::Syntax(error.to_string());
    let mut value = serde_json::to_value(config).map_err(|e| failed(&e))?;
    // What Go leaves out when it is empty.
    drop_if(&mut value, "featureGates", |v| v.as_object().is_some_and(Map::is_empty));
    drop_if(&mut value, "windowsRunAsService", |v| v == &Value::Bool(false));
    if let Some(logging) = value.get_mut("logging") {
        drop_if(logging, "vmodule", |v| v.as_array().is_some_and(Vec::is_empty));
        drop_if(logging, "options", Value::is_null);
    }
    // Go writes whole numbers without a point.
    if let Some(qps) = value.pointer_mut("/clientConnection/qps")
        && config.client_connection.qps.fract() == 0.0
        && let Ok(whole) = config.client_connection.qps.to_string().parse::<i64>()
    {
        *qps = whole.into();
    }
    serde_saphyr::to_string(&value).map_err(|e| failed(&e))
}

fn drop_if(value: &mut Value, key: &str, empty: fn(&Value) -> bool) {
    if let Value::Object(fields) = value
        && fields.get(key).is_some_and(empty)
    {
        fields.remove(key);
    }
}

fn documents(text: &str, warnings: &mut Vec<String>) -> Result<Vec<Value>, ConfigError> {
    let strict = serde_saphyr::options! { with_snippet: false };
    let error = match serde_saphyr::from_multiple_with_options(text, strict) {
        Ok(documents) => return Ok(documents),
        Err(error) => error,
    };
    let lenient = serde_saphyr::options! {
        with_snippet: false,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
    };
    match serde_saphyr::from_multiple_with_options(text, lenient) {
        Ok(documents) => {
            warnings.push(format!("{error}: the last one counts"));
            Ok(documents)
        }
        Err(_) => Err(ConfigError::Syntax(error.to_string())),
    }
}

fn typed<T: DeserializeOwned>(kind: &'static str, document: &Value) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(document).map_err(|error| ConfigError::Field {
        kind,
        field: error.path().to_string(),
        message: error.inner().to_string(),
    })
}

/// All fields that a type has: it is written with every one of them.
fn known_fields<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// Warnings for fields of a document that a type does not have.
fn unknown(kind: &str, document: &Value, known: &Value) -> Vec<String> {
    let mut found = Vec::new();
    gather(document, known, "", &mut found);
    found.into_iter().map(|field| format!("{kind}: unknown field {field:?}: ignored")).collect()
}

fn gather(document: &Value, known: &Value, path: &str, found: &mut Vec<String>) {
    let (Value::Object(document), Value::Object(known)) = (document, known) else { return };
    for (key, value) in document {
        let field = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match known.get(key) {
            // Names of gates are not fields.
            Some(_) if field == "featureGates" => {}
            Some(known) => gather(value, known, &field, found),
            None => found.push(field),
        }
    }
}
