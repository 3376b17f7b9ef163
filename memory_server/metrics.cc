#include "memory_server/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <vector>

namespace memory3 {
namespace {

const prometheus::Histogram::BucketBoundaries kSeconds = {
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1,    0.25,    0.5,    1,     2.5,    5,     10,   30,    60};

}  // namespace

MemoryServerMetrics::MemoryServerMetrics(MemoryStore* store)
    : store_(store),
      requests_(prometheus::BuildCounter()
                    .Name("memory3_memory_requests_total")
                    .Help("Requests by method and canonical status code")
                    .Register(registry_)),
      seconds_(
          prometheus::BuildHistogram()
              .Name("memory3_memory_request_seconds")
              .Help("Time taken by method; of Retrieve, from request to the answer's last message")
              .Register(registry_)),
      queries_(prometheus::BuildCounter()
                   .Name("memory3_retrieve_queries_total")
                   .Help("Query vectors searched")
                   .Register(registry_)
                   .Add({})),
      hits_(prometheus::BuildCounter()
                .Name("memory3_retrieve_hits_total")
                .Help("Hits answered")
                .Register(registry_)
                .Add({})),
      held_hits_(prometheus::BuildCounter()
                     .Name("memory3_retrieve_held_hits_total")
                     .Help("Hits answered without bytes, since the client held them")
                     .Register(registry_)
                     .Add({})),
      record_bytes_(prometheus::BuildCounter()
                        .Name("memory3_retrieve_record_bytes_total")
                        .Help("Bytes of records sent")
                        .Register(registry_)
                        .Add({})),
      unreadable_(prometheus::BuildCounter()
                      .Name("memory3_retrieve_unreadable_records_total")
                      .Help("Records of hits that could not be read")
                      .Register(registry_)
                      .Add({})),
      streams_(prometheus::BuildGauge()
                   .Name("memory3_retrieve_streams")
                   .Help("Open Retrieve streams")
                   .Register(registry_)
                   .Add({})) {}

std::string MemoryServerMetrics::Text() const {
  const StoreStatus status = store_->GetStatus();
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  const auto gauge = [&families](const char* name, const char* help, uint64_t value) {
    prometheus::ClientMetric metric;
    metric.gauge.value = static_cast<double>(value);
    families.push_back({name, help, prometheus::MetricType::Gauge, {metric}});
  };
  gauge("memory3_knowledge_bases", "Knowledge bases", status.knowledge_bases);
  gauge("memory3_entries", "Entries of published versions", status.entries);
  gauge("memory3_records", "Distinct records of published versions", status.records);
  gauge("memory3_disk_bytes", "Bytes of the store on disk", status.disk_bytes);
  gauge("memory3_index_bytes", "Bytes of the indexes in memory", status.index_bytes);
  gauge("memory3_writable", "1 where writes succeed", status.writable.ok() ? 1 : 0);
  return prometheus::TextSerializer().Serialize(families);
}

void MemoryServerMetrics::CountRequest(const std::string& method, const absl::Status& status,
                                       absl::Duration took) {
  requests_.Add({{"method", method}, {"code", absl::StatusCodeToString(status.code())}})
      .Increment();
  seconds_.Add({{"method", method}}, kSeconds).Observe(absl::ToDoubleSeconds(took));
}

void MemoryServerMetrics::CountRetrieve(uint64_t queries, uint64_t hits, uint64_t held_hits,
                                        uint64_t record_bytes, uint64_t unreadable) {
  queries_.Increment(static_cast<double>(queries));
  hits_.Increment(static_cast<double>(hits));
  held_hits_.Increment(static_cast<double>(held_hits));
  record_bytes_.Increment(static_cast<double>(record_bytes));
  unreadable_.Increment(static_cast<double>(unreadable));
}

}  // namespace memory3
