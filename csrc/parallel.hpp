// A loop over independent items on a few threads. The caller's thread works too; the first exception is rethrown.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mgrpo {

// Each worker makes its own body with `make_body()` (its scratch memory lives there) and calls body(begin, end) for
// pieces of `grain` items of [0, count), taken in order by whichever thread is free.
template <typename MakeBody>
void parallel_for(int64_t count, int64_t grain, int threads, const MakeBody& make_body) {
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t workers = threads < pieces ? threads : pieces;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&] {
    try {
      auto body = make_body();
      for (int64_t piece = next++; piece < pieces; piece = next++) {
        const int64_t begin = piece * grain;
        body(begin, begin + grain < count ? begin + grain : count);
      }
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::jthread> others;
  for (int64_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  others.clear();  // joins
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mgrpo
