// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator. A draw is a pure function of (key, counter), so it
// depends on no thread, no arrival order and no restart.
#pragma once

#include <array>
#include <cstdint>

namespace mgrpo {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// One block of 4 x 32 random bits. Zero key and zero counter give 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
PhiloxCounter philox4x32_10(PhiloxCounter counter, PhiloxKey key);

}  // namespace mgrpo
