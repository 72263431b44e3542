//! What exports have served: for `recovery NAME`, and for `/metrics` in the text form of OpenMetrics.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::{ExportName, ExportTable, LATENCY_BOUNDS_US, Latency, OPERATIONS, Operation, Statistics};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::metrics::House;

/// What an export has served since it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Served {
    /// NBD connections now.
    pub connections: usize,
    /// Reads, and how many of them were answered from memory at once.
    pub reads: u64,
    /// Reads that were answered from memory at once.
    pub reads_from_memory: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, not counting zeroes and trims.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Trims and zeroes.
    pub discards: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests that made no sense.
    pub refused: u64,
    /// Half of the reads took no longer, in microseconds; a bound.
    pub read_p50_us: Option<u64>,
    /// 99 in a hundred reads took no longer.
    pub read_p99_us: Option<u64>,
    /// 99 in a hundred writes took no longer.
    pub write_p99_us: Option<u64>,
    /// 99 in a hundred flushes took no longer.
    pub flush_p99_us: Option<u64>,
}

impl Served {
    /// Of one export; `None` if the table has none of that name.
    pub fn of(table: &ExportTable, name: &ExportName) -> Option<Served> {
        let statistics = table.statistics(name)?;
        let count = |operation| statistics.count(operation);
        let quantile = |operation, per_mille| {
            let bound = statistics.latency(operation).quantile(per_mille);
            bound.and_then(|bound| u64::try_from(bound.as_micros()).ok())
        };
        let (reads, writes) = (count(Operation::Read), count(Operation::Write));
        Some(Served {
            connections: table.connections(name).unwrap_or(0),
            reads: reads.requests,
            reads_from_memory: statistics.resident_reads(),
            read_bytes: reads.bytes,
            writes: writes.requests,
            write_bytes: writes.bytes,
            flushes: count(Operation::Flush).requests,
            discards: count(Operation::Trim).requests + count(Operation::WriteZeroes).requests,
            errors: OPERATIONS.iter().map(|operation| count(*operation).errors).sum(),
            refused: statistics.refused(),
            read_p50_us: quantile(Operation::Read, 500),
            read_p99_us: quantile(Operation::Read, 990),
            write_p99_us: quantile(Operation::Write, 990),
            flush_p99_us: quantile(Operation::Flush, 990),
        })
    }
}

/// The exports of a recovery, or of a command that serves a machine's disks.
#[derive(Debug)]
pub struct Group {
    /// `recovery` or `machine`.
    pub label: &'static str,
    /// Its name.
    pub name: String,
    /// The exports.
    pub table: Arc<ExportTable>,
}

/// All metrics of a process.
pub fn metrics(groups: Vec<Group>, house: House) -> Result<String, fmt::Error> {
    let mut rows = Vec::new();
    for group in groups {
        for export in group.table.list() {
            if let Some(statistics) = group.table.statistics(&export) {
                let connections = group.table.connections(&export).unwrap_or(0);
                let labels = [(group.label, group.name.clone()), ("export", export.to_string())];
                rows.push(Row { labels, statistics, connections });
            }
        }
    }
    let mut registry = Registry::default();
    registry.register_collector(Box::new(house));
    registry.register_collector(Box::new(Exports(rows)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Exports(Vec<Row>);

#[derive(Debug)]
struct Row {
    labels: [(&'static str, String); 2],
    statistics: Arc<Statistics>,
    connections: usize,
}

/// A metric's name, what it is, and where its value comes from.
type PerOperation = (&'static str, &'static str, fn(&Statistics, Operation) -> u64);
type PerExport = (&'static str, &'static str, fn(&Statistics) -> u64);

impl Collector for Exports {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let per_operation: [PerOperation; 3] = [
            ("lifeboat_export_requests", "NBD requests that reached the export", |s, o| s.count(o).requests),
            ("lifeboat_export_bytes", "Bytes that they covered", |s, o| s.count(o).bytes),
            ("lifeboat_export_errors", "NBD requests that failed", |s, o| s.count(o).errors),
        ];
        for (name, help, value) in per_operation {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (row, operation) in self.by_operation() {
                let labels = row.with(operation);
                ConstCounter::new(value(&row.statistics, operation)).encode(metric.encode_family(&labels)?)?;
            }
        }
        let per_export: [PerExport; 2] = [
            ("lifeboat_export_reads_from_memory", "Reads answered from memory at once", Statistics::resident_reads),
            ("lifeboat_export_refused", "NBD requests that made no sense", Statistics::refused),
        ];
        for (name, help, value) in per_export {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for row in &self.0 {
                ConstCounter::new(value(&row.statistics)).encode(metric.encode_family(&row.labels.as_slice())?)?;
            }
        }
        let help = "NBD connections now";
        let mut metric = encoder.encode_descriptor("lifeboat_export_connections", help, None, MetricType::Gauge)?;
        for row in &self.0 {
            let connections = i64::try_from(row.connections).unwrap_or(i64::MAX);
            ConstGauge::new(connections).encode(metric.encode_family(&row.labels.as_slice())?)?;
        }
        let help = "Time from reading an NBD request to its answer";
        let mut metric = encoder.encode_descriptor("lifeboat_export_seconds", help, None, MetricType::Histogram)?;
        for (row, operation) in self.by_operation() {
            let labels = row.with(operation);
            histogram(&row.statistics.latency(operation), metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl Exports {
    fn by_operation(&self) -> impl Iterator<Item = (&Row, Operation)> {
        self.0.iter().flat_map(|row| OPERATIONS.iter().map(move |operation| (row, *operation)))
    }
}

impl Row {
    fn with(&self, operation: Operation) -> Vec<(&'static str, String)> {
        let operation = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Trim => "trim",
            Operation::WriteZeroes => "write_zeroes",
            Operation::Cache => "cache",
            Operation::BlockStatus => "block_status",
        };
        self.labels.iter().cloned().chain([("operation", operation.to_owned())]).collect()
    }
}

fn histogram(latency: &Latency, mut encoder: MetricEncoder) -> Result<(), fmt::Error> {
    let bounds = LATENCY_BOUNDS_US.iter().map(|bound| Duration::from_micros(*bound).as_secs_f64());
    let buckets: Vec<(f64, u64)> = bounds.chain([f64::INFINITY]).zip(latency.classes).collect();
    let count = latency.classes.iter().sum();
    encoder.encode_histogram::<NoLabelSet>(latency.total.as_secs_f64(), count, &buckets, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::MemoryExport;

    #[test]
    fn metrics_name_every_export_and_end_as_the_format_wants() {
        let table = Arc::new(ExportTable::new());
        let name = ExportName::new("disk \"0\"").expect("a name");
        table.add(name.clone(), Arc::new(MemoryExport::new(4096))).expect("free");
        let group = Group { label: "recovery", name: "web01".to_owned(), table: table.clone() };
        let text = metrics(vec![group], House::default()).expect("encoded");
        let line = r#"lifeboat_export_requests_total{recovery="web01",export="disk \"0\"",operation="read"} 0"#;
        assert!(text.contains(line), "{text}");
        assert!(text.contains("# TYPE lifeboat_export_seconds histogram"), "{text}");
        assert!(
            text.contains(r#"_bucket{le="+Inf",recovery="web01",export="disk \"0\"",operation="write"} 0"#),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
        let served = Served::of(&table, &name).expect("it is there");
        assert_eq!((served.reads, served.read_p99_us), (0, None));
    }
}
