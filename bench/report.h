// What every benchmark says at its end: a table for people, and a JSON file for programs,
//   {"name", "commit", "machine", "metrics": {"metric_name": number}}
// written to --out DIR (default build/bench) as NAME.json.
//
// Thread-safety: one thread.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace memory3 {

// "AMD EPYC, 2 cores, 23 GiB"; from /proc.
std::string MachineName();

class BenchReport {
 public:
  explicit BenchReport(std::string name) : name_(std::move(name)) {}

  // `unit` and `target` are for the table only ("tokens/s", ">= 0.75").
  void Add(std::string_view metric, double value, std::string_view unit = "",
           std::string_view target = "");
  // A line under the table: what was left out, and why.
  void Note(std::string note) { notes_.push_back(std::move(note)); }
  // Prints the table and writes `directory`/NAME.json (atomically). Returns the process's exit
  // code: 1 where the file cannot be written, with a message on stderr.
  int Write(std::string_view directory = "build/bench") const;

 private:
  struct Row {
    std::string metric;
    double value;
    std::string unit, target;
  };
  std::string name_;
  std::vector<Row> rows_;
  std::vector<std::string> notes_;
};

}  // namespace memory3
