//! `shunt dump`: offline from manifests, from the running agent, or straight from the kernel.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use shunt_core::compile::Compiler;
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::table::{Change, ForwardingTable, PortEntry, SourceClass, Target};
use shunt_mode::driver::{Driver, Output, Stage};

use crate::admin::{self, AskError, Request};
use crate::cli::{DumpArgs, DumpOutput, DumpStage};
use crate::offline::Offline;
use crate::settings::Settings;

/// What to print, as it is also sent to the running agent.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct DumpRequest {
    pub stage: DumpStage,
    pub service: Option<String>,
    pub output: DumpOutput,
}

pub(crate) fn dump(args: &DumpArgs) -> Result<()> {
    let request = DumpRequest { stage: args.stage, service: args.service.clone(), output: args.output };
    let text = if let Some(path) = &args.manifests {
        offline(args, path, &request)?
    } else {
        match admin::ask(&args.admin_socket, &Request::Dump(request.clone())) {
            // Without an agent the kernel still answers for itself, in its own words.
            Err(AskError::NoAgent(_)) if request.stage == DumpStage::Kernel && request.service.is_none() => {
                kernel(args, request.output)?
            }
            answer => answer?,
        }
    };
    print!("{text}");
    Ok(())
}

/// What the kernel of this network namespace holds.
fn kernel(args: &DumpArgs, format: DumpOutput) -> Result<String> {
    let mode = Settings::new(&args.settings, None)?.mode;
    let mut texts = Vec::new();
    for family in IpFamily::ALL {
        let mut driver = shunt_modes::open(mode, family, shunt_modes::Options::default())?;
        texts.push(driver.dump(&ForwardingTable::new(family), Stage::Kernel, None, output(format))?);
    }
    join(&texts, format)
}

fn offline(args: &DumpArgs, path: &std::path::Path, request: &DumpRequest) -> Result<String> {
    let Offline { compiler, settings, .. } =
        Offline::read(path, args.node.as_deref().unwrap_or_default(), &args.settings)?;
    render(&compiler, request, |table, stage, only, output| {
        if stage == Stage::Kernel {
            bail!("--stage kernel reads a kernel: leave out --manifests");
        }
        Ok(shunt_modes::dump(settings.mode, table, stage, only, output)?)
    })
}

/// Prints what a running agent is asked for.
pub(crate) fn live(
    compiler: &Compiler,
    drivers: &mut [&mut Box<dyn Driver>],
    request: &DumpRequest,
) -> Result<String> {
    render(compiler, request, |table, stage, only, output| {
        let driver = drivers
            .iter_mut()
            .find(|driver| driver.family() == table.family())
            .context("this family is not served")?;
        Ok(driver.dump(table, stage, only, output)?)
    })
}

const fn output(output: DumpOutput) -> Output {
    match output {
        DumpOutput::Text => Output::Text,
        DumpOutput::Json => Output::Json,
    }
}

fn render(
    compiler: &Compiler,
    request: &DumpRequest,
    mut print: impl FnMut(&ForwardingTable, Stage, Option<&Change>, Output) -> Result<String>,
) -> Result<String> {
    let service = request.service.as_deref().map(parse_service).transpose()?;
    if let Some(name) = &service
        && IpFamily::ALL.iter().all(|f| compiler.table(*f).service(name).is_none())
    {
        bail!("no Service {name} is served here (headless and ExternalName Services never are)");
    }
    let mut texts = Vec::new();
    for family in IpFamily::ALL {
        let table = compiler.table(family);
        if request.output == DumpOutput::Text
            && service.as_ref().is_some_and(|name| table.service(name).is_none())
        {
            continue;
        }
        let stage = match request.stage {
            DumpStage::Table => {
                texts.push(print_table(table, service.as_ref(), request.output));
                continue;
            }
            DumpStage::State => Stage::State,
            DumpStage::Plan => Stage::Plan,
            DumpStage::Kernel => Stage::Kernel,
        };
        let only = service.as_ref().map(|name| change_of(table, name));
        texts.push(print(table, stage, only.as_ref(), output(request.output))?);
    }
    join(&texts, request.output)
}

fn join(texts: &[String], output: DumpOutput) -> Result<String> {
    if output == DumpOutput::Text {
        return Ok(texts.concat());
    }
    let families = IpFamily::ALL.iter().map(ToString::to_string);
    let values = texts.iter().map(|t| serde_json::from_str(t));
    let object = families
        .zip(values)
        .map(|(family, value)| Ok((family, value?)))
        .collect::<Result<serde_json::Map<String, Value>>>()?;
    Ok(format!("{:#}\n", Value::Object(object)))
}

fn parse_service(text: &str) -> Result<NamespacedName> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(NamespacedName::new(namespace, name))
        }
        _ => bail!("--service: {text:?} is not of the form namespace/name"),
    }
}

/// What belongs to one Service.
fn change_of(table: &ForwardingTable, name: &NamespacedName) -> Change {
    let mut change = Change::default();
    let Some(service) = table.service(name) else { return change };
    change.cluster_ips.insert(service.cluster_ip);
    for port in &service.ports {
        change.frontends.extend(port.frontends.iter().map(|f| f.frontend));
        for target in [&port.cluster, &port.local].into_iter().flatten().flat_map(|g| g.iter()) {
            let protocol = port.name.protocol;
            if target.local {
                let (address, port) = (target.address, target.port);
                change.local_endpoints.insert(shunt_core::table::LocalEndpoint { address, protocol, port });
            }
        }
    }
    change
}

fn print_table(table: &ForwardingTable, service: Option<&NamespacedName>, output: DumpOutput) -> String {
    let services: Vec<_> = table.services().filter(|s| service.is_none_or(|name| s.name == *name)).collect();
    match (output, service) {
        (DumpOutput::Text, None) => table.to_string(),
        (DumpOutput::Text, Some(_)) => {
            services.iter().map(|s| table.display_service(s).to_string()).collect()
        }
        (DumpOutput::Json, _) => {
            let ports: Vec<Value> =
                services.iter().flat_map(|s| &s.ports).map(|port| port_json(table, port)).collect();
            let node = table.node();
            let value = json!({
                "family": table.family(),
                "node": node.to_string(),
                "serviceCIDRs": table.service_cidrs(),
                "ports": ports,
            });
            format!("{value:#}\n")
        }
    }
}

fn port_json(table: &ForwardingTable, port: &PortEntry) -> Value {
    let targets = |group: Option<&[Target]>| {
        group.map(|g| {
            g.iter().map(|t| json!({ "address": t.to_string(), "local": t.local })).collect::<Vec<_>>()
        })
    };
    let frontends: Vec<Value> = port
        .frontends
        .iter()
        .map(|f| {
            let held = table.frontend(&f.frontend).is_some_and(|(p, _)| p.name == port.name);
            let verdicts: serde_json::Map<String, Value> = SourceClass::ALL
                .iter()
                .map(|class| (class.to_string(), f.verdict(*class).to_string().into()))
                .collect();
            json!({
                "kind": f.kind.to_string(),
                "frontend": f.frontend.to_string(),
                "held": held,
                "verdicts": verdicts,
                "sourceRanges": f.source_ranges.as_ref().map(|g| &g.ranges),
            })
        })
        .collect();
    json!({
        "service": port.name.service.to_string(),
        "port": &*port.name.port,
        "protocol": port.name.protocol,
        "affinitySeconds": port.affinity.map(|t| t.as_secs()),
        "frontends": frontends,
        "cluster": targets(port.cluster.as_deref()),
        "local": targets(port.local.as_deref()),
    })
}
