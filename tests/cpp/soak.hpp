#pragma once

#include <cstdint>

// Simulates a long run: `arrivals` small trajectories in groups that are opened, sealed, failed, re-delivered, planned,
// written, dropped and expired at random. Exits with 1 when memory grows after the first tenth or anything is lost.
void soak(int64_t arrivals);
