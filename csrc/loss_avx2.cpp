#define MGRPO_LANES 8
#define MGRPO_TABLE isa_avx2
#include "loss_isa_impl.hpp"
