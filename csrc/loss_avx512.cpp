#define MGRPO_LANES 16
#define MGRPO_TABLE isa_avx512
#include "loss_isa_impl.hpp"
