//! The command line. Flags that kube-proxy has keep its names and meanings.

// Doc comments here are help texts: backticks would be printed.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use shunt_config::Duration;

use crate::flags::KubeProxyFlags;

/// Where the running agent listens for `shunt dump` and `shunt explain`.
pub(crate) const ADMIN_SOCKET: &str = "/run/shunt/shunt.sock";

/// A Kubernetes service proxy for Linux nodes: a drop-in replacement for kube-proxy.
#[derive(Parser, Debug)]
#[command(
    name = "shunt",
    version,
    propagate_version = true,
    after_help = "\
Examples:
  shunt run --kubeconfig /etc/kubernetes/kubelet.conf --cluster-cidr 10.244.0.0/16
  shunt run --manifests examples/services --hostname-override worker-1
  shunt dump --service default/web
  shunt dump --manifests examples/services --node worker-1 --stage state
  shunt explain --from external --to 192.0.2.11:30080
  shunt cleanup

Called as `kube-proxy` (by the name of the executable) it behaves as `shunt run`."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Programs this node's kernel, and keeps it up to date, until it is stopped. Rules stay.
    // What `kube-proxy --version` says.
    #[command(display_name = "shunt")]
    Run(Box<RunArgs>),
    /// Prints the forwarding table, the rules made of it, or what the kernel holds.
    Dump(Box<DumpArgs>),
    /// Says where a packet goes and why: frontend, policy, endpoints chosen and left out, masquerade.
    Explain(Box<ExplainArgs>),
    /// Removes everything that Shunt has put into this node's kernel. Safe to run twice.
    Cleanup(Box<CleanupArgs>),
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text each.
    #[default]
    Text,
    /// One JSON object each.
    Json,
}

#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LogArgs {
    /// Verbosity as in klog: 0 to 3 what an operator wants to know, 4 debug, 6 everything.
    #[arg(short = 'v', long = "v", value_name = "LEVEL", global = true)]
    pub verbosity: Option<u8>,
    /// Format of log lines, which go to standard error. Default: text.
    #[arg(long, value_enum, global = true)]
    pub logging_format: Option<LogFormat>,
    /// klog's flags that mean nothing here.
    #[command(flatten)]
    pub klog: KlogFlags,
}

/// Accepted and ignored: lines are written at once, and there are no Go source files.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct KlogFlags {
    #[arg(long, value_name = "PATTERN=N,...", hide = true, global = true)]
    pub vmodule: Option<String>,
    #[arg(long, value_name = "DURATION", hide = true, global = true)]
    pub log_flush_frequency: Option<String>,
    #[arg(long, value_name = "QUANTITY", hide = true, global = true)]
    pub log_json_info_buffer_size: Option<String>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true, global = true)]
    pub log_json_split_stream: Option<bool>,
    #[arg(long, value_name = "QUANTITY", hide = true, global = true)]
    pub log_text_info_buffer_size: Option<String>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true, global = true)]
    pub log_text_split_stream: Option<bool>,
}

/// Settings that flags and configuration file share. With `--config`, the file wins.
#[derive(Args, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct SettingArgs {
    /// File with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How to program the kernel: nftables, iptables, ipvs, ebpf, or auto for the best that the kernel
    /// can run. Default: auto.
    #[arg(long, visible_alias = "proxy-mode", value_name = "MODE")]
    pub mode: Option<String>,
    /// Range of pod addresses, one or one of each family: traffic from elsewhere to a cluster IP is
    /// masqueraded.
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub cluster_cidr: Option<String>,
    /// How local pods are recognised: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix.
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<String>,
    /// Bridge over which local pods are reached, for BridgeInterface.
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// How the names of local pods' interfaces start, for InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Masquerade all traffic to cluster IPs.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub masquerade_all: Option<bool>,
    /// Bit of the packet mark that asks for masquerade (0 to 31).
    #[arg(long, value_name = "BIT")]
    pub iptables_masquerade_bit: Option<u8>,
    /// Addresses on which node ports answer: primary, all, localhost, or ranges. Default: primary.
    #[arg(long = "nodeport-addresses", value_name = "CIDR[,CIDR...]", value_delimiter = ',')]
    pub node_port_addresses: Vec<String>,
    #[command(flatten)]
    pub modes: ModeArgs,
}

/// Settings of single modes for which `KubeProxyConfiguration` has no place.
#[derive(Args, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct ModeArgs {
    /// Flavour of iptables, legacy or nft. Default: the kubelet's, else the one with more rules.
    #[arg(long, value_name = "FLAVOUR")]
    pub iptables_flavour: Option<shunt_modes::Flavour>,
    /// cgroup2 folder whose processes, with those of all folders below, are served at their sockets.
    /// Default: the root of the first cgroup2 that is mounted.
    #[arg(long, value_name = "PATH")]
    pub cgroup_root: Option<PathBuf>,
    /// bpffs in which maps, programs and links are kept, so that they outlive the process. Default:
    /// /sys/fs/bpf.
    #[arg(long, value_name = "PATH")]
    pub bpf_fs_root: Option<PathBuf>,
    /// Most frontends (address, port and protocol of a Service) in ebpf mode. Default: 65536.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=4_194_304))]
    pub ebpf_frontends_max: Option<u32>,
    /// Most endpoints in ebpf mode, counted once for each Service port. Default: 262144.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=4_194_304))]
    pub ebpf_endpoints_max: Option<u32>,
    /// Entries of the connection table in ebpf mode, two to four for each connection; the table of
    /// sockets has half as many. Default: 262144.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=33_554_432))]
    pub ebpf_flows_max: Option<u32>,
    /// Most clients with session affinity in ebpf mode, counted once for each Service port; those seen
    /// least recently are forgotten first. Default: 65536.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(64..=33_554_432))]
    pub ebpf_clients_max: Option<u32>,
    /// Most groups of endpoints in ebpf mode among which Maglev chooses, 64 KiB each; endpoints of others
    /// are chosen by chance. Default: 4096.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=262_144))]
    pub ebpf_maglev_max: Option<u32>,
    /// Destroy sockets of this node's processes in ebpf mode that were sent to an endpoint, when it is gone. Default: no.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub ebpf_destroy_sockets: Option<bool>,
    /// How ebpf mode chooses endpoints for external traffic, where a Service does not say: random or
    /// maglev. Default: random.
    #[arg(long, value_name = "ALGORITHM", value_enum)]
    pub ebpf_external_algorithm: Option<ExternalAlgorithm>,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum ExternalAlgorithm {
    /// By chance.
    Random,
    /// By a consistent hash of addresses and ports.
    Maglev,
}

impl ModeArgs {
    /// What the configuration says of the modes, unless a flag says otherwise.
    pub(crate) fn options(&self, file: &shunt_config::shunt::Ebpf) -> shunt_modes::Options {
        let default = shunt_modes::EbpfOptions::default();
        let path = |flag: &Option<PathBuf>, text: &Option<String>| {
            flag.clone().or_else(|| text.as_ref().map(PathBuf::from))
        };
        let size = |flag: Option<u32>, field: Option<u32>, default| flag.or(field).unwrap_or(default);
        let seconds = |t: shunt_config::Duration| u32::try_from(t.to_std().as_secs()).unwrap_or(u32::MAX);
        let ebpf = shunt_modes::EbpfOptions {
            cgroup_root: path(&self.cgroup_root, &file.cgroup_root),
            bpf_root: path(&self.bpf_fs_root, &file.bpf_fs_root).unwrap_or(default.bpf_root),
            frontends: size(self.ebpf_frontends_max, file.frontends_max, default.frontends),
            endpoints: size(self.ebpf_endpoints_max, file.endpoints_max, default.endpoints),
            flows: size(self.ebpf_flows_max, file.flows_max, default.flows),
            clients: size(self.ebpf_clients_max, file.clients_max, default.clients),
            maglev: size(self.ebpf_maglev_max, file.maglev_max, default.maglev),
            tcp_timeout: seconds(file.tcp_timeout),
            tcp_transient_timeout: seconds(file.tcp_transient_timeout),
            udp_timeout: seconds(file.udp_timeout),
            destroy_sockets: self.ebpf_destroy_sockets.unwrap_or(file.destroy_sockets),
            clsact: default.clsact,
            object: default.object,
        };
        shunt_modes::Options { flavour: self.iptables_flavour, ebpf: ebpf.into(), ..Default::default() }
    }
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  shunt run --config /var/lib/kube-proxy/config.conf
  shunt run --kubeconfig ~/.kube/config --hostname-override worker-1 --cluster-cidr 10.244.0.0/16
  shunt run --manifests ./manifests --hostname-override worker-1    # no cluster needed

Needs CAP_NET_ADMIN. Exits with 0 on SIGTERM and SIGINT; rules stay in place, and the next start
takes them over without breaking a connection.")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub settings: SettingArgs,
    /// File or folder of manifests (YAML, JSON) to use instead of an API server; followed live.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["kubeconfig", "master"])]
    pub manifests: Option<PathBuf>,
    /// URL of the API server; overrides that of the kubeconfig.
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Name of this node; default: the host name in lower case. Wins over the configuration.
    #[arg(long, visible_alias = "node", value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// File with a ShuntConfiguration, if it is not in that of --config.
    #[arg(long, value_name = "FILE")]
    pub shunt_config: Option<PathBuf>,
    /// Least time from the end of one sync to the start of the next, such as 1ms or 1s. Overrides the
    /// configuration.
    #[arg(long, value_name = "DURATION")]
    pub min_sync_period: Option<Duration>,
    /// Where `shunt dump` and `shunt explain` reach the running agent; empty for nowhere. Default:
    /// /run/shunt/shunt.sock.
    #[arg(long, value_name = "PATH")]
    pub admin_socket: Option<String>,
    /// Remove everything that Shunt and kube-proxy have put into the kernel, and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub cleanup: Option<bool>,
    /// Write the configuration with all defaults to this file, and exit.
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// Do what needs full root privileges (sysctls), and exit: for an init container. Afterwards
    /// CAP_NET_ADMIN is enough.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub init_only: Option<bool>,
    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,
}

#[derive(Args, Debug)]
pub(crate) struct CleanupArgs {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub modes: ModeArgs,
    /// Only what this mode put there.
    #[arg(long, value_name = "MODE")]
    pub mode: Option<String>,
}

/// What to print.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DumpStage {
    /// What Services mean on this node, whatever the mode.
    #[default]
    Table,
    /// The rules that the mode makes of it.
    State,
    /// The operations that lead there from what the kernel holds (offline: from an empty kernel).
    Plan,
    /// What the kernel holds.
    Kernel,
}

/// How to print it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DumpOutput {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  shunt dump                                  # what Services mean on this node, from the running agent
  shunt dump --stage kernel                   # what the kernel holds; needs root, but no agent
  shunt dump --stage plan                     # what the agent would change now: nothing, if all is well
  shunt dump --service kube-system/kube-dns --stage state -o json
  shunt dump --manifests ./manifests --node worker-1 --stage state | nft -c -f -   # no cluster, no root")]
pub(crate) struct DumpArgs {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub settings: SettingArgs,
    /// What to print.
    #[arg(long, value_enum, default_value_t)]
    pub stage: DumpStage,
    /// Only this Service.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
    /// How to print it.
    #[arg(short = 'o', long, value_enum, default_value_t)]
    pub output: DumpOutput,
    /// File or folder of manifests to compile offline, instead of asking the running agent.
    #[arg(long, value_name = "PATH", requires = "node")]
    pub manifests: Option<PathBuf>,
    /// Name of the node to compile for, with --manifests.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Where the running agent listens.
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
}

#[derive(Args, Debug)]
#[command(
    mut_arg("mode", |arg| arg.help(
        "Answer from the rules of this mode instead of the forwarding table, and compare both: rules \
         in the kernel, or with --manifests those that would be there"
    )),
    after_help = "\
Sources:
  ADDRESS     whoever has it: 10.244.1.11, 2001:db8::7
  node        this node: its primary address of the destination's family
  external    somebody outside of the cluster: an address of 203.0.113.0/24 or 2001:db8:ffff::/120
  pod/ADDRESS a pod by its address
  pod/[NAMESPACE/]NAME
              a pod by its name, if it is an endpoint of a Service (by targetRef of its EndpointSlice), or
              with --manifests a Pod among them

Examples:
  shunt explain --from 10.244.1.11 --to 10.96.0.10:80
  shunt explain --from pod/demo/web-0 --to 10.96.0.10:80
  shunt explain --from external --to 192.0.2.11:30080           # a node port, from outside
  shunt explain --from node --to 10.96.0.53:53/udp -o json
  shunt explain --from node --to '[fd00:10:96::70]:80'
  shunt explain --from 10.244.1.11 --to 10.96.0.10:80 --mode nftables    # what the kernel's rules say
  shunt explain --manifests ./manifests --node worker-1 --from pod/web-0 --to 10.96.0.10:80
  shunt explain --manifests ./manifests --node worker-1 --packets packets.json -o json

A file of packets is a JSON list of {\"name\", \"src\", \"dst\", \"dport\", \"proto\"}; \"interface\" is that by
which the packet comes in; \"expect\": {\"verdict\", \"endpoints\", \"masquerade\"} is compared with the
answer, for modes in \"modes\" only if that is given.

Exit status: 0 when all agree, 3 when an answer is not as expected or rules and table differ, 1 when
the question could not be answered."
)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub settings: SettingArgs,
    /// Source of the packet.
    #[arg(
        long,
        value_name = "ADDRESS|node|external|pod/NAME",
        required_unless_present = "packets",
        conflicts_with = "packets"
    )]
    pub from: Option<String>,
    /// Interface by which the packet comes in, where local pods are recognised by interface.
    #[arg(long, value_name = "NAME", requires = "from")]
    pub from_interface: Option<String>,
    /// Destination of the packet; TCP unless a protocol is given. IPv6 addresses stand in brackets.
    #[arg(
        long,
        value_name = "ADDRESS:PORT[/PROTOCOL]",
        required_unless_present = "packets",
        conflicts_with = "packets"
    )]
    pub to: Option<String>,
    /// File of packets to ask about (see below); - for standard input.
    #[arg(long, value_name = "FILE")]
    pub packets: Option<PathBuf>,
    /// How to print the answers.
    #[arg(short = 'o', long, value_enum, default_value_t)]
    pub output: DumpOutput,
    /// File or folder of manifests to compile offline, instead of asking the running agent.
    #[arg(long, value_name = "PATH", requires = "node")]
    pub manifests: Option<PathBuf>,
    /// Name of the node to compile for, with --manifests.
    #[arg(long, value_name = "NAME", requires = "manifests")]
    pub node: Option<String>,
    /// Where the running agent listens.
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
}
