#include "bn_act_kernels.h"

#ifdef FASTLOCAL_X86
#pragma GCC target("arch=skylake-avx512")
#define FASTLOCAL_ISA avx512
#include "bn_act_body.h"
#endif
