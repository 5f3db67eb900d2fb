#define MGRPO_LANES 4
#define MGRPO_TABLE isa_scalar
#include "loss_isa_impl.hpp"
