/* A firmware that does nothing but predict: what it weighs is what the network weighs. */

#include "inq_network.h"

static uint8_t image[INQ_INPUTS];
static int32_t logits[INQ_OUTPUTS];

void begin(void)
{
    for (;;)
        inq_predict(image, logits);
}

__asm__(".globl _start\n"
        "_start:\n"
        ".option push\n"
        ".option norelax\n"
        "la gp, __global_pointer$\n"
        ".option pop\n"
        "j begin\n");
