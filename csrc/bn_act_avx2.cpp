#include "bn_act_kernels.h"

#ifdef FASTLOCAL_X86
#pragma GCC target("arch=haswell")
#define FASTLOCAL_ISA avx2
#include "bn_act_body.h"
#endif
