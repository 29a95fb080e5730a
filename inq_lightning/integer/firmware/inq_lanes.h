/* Sums of four pixels in two words, 16 bits each: pixels 0 and 2 in `even`, 1 and 3 in `odd`. All is linear modulo 2^32,
 * so what leaves its 16 bits on the way does no harm; the tables see to it that no sum lies beyond -32767 to 32767 when
 * it is taken out. */

#ifndef INQ_LANES_H
#define INQ_LANES_H

#include <stdint.h>

#ifdef __GNUC__
#define INQ_APART static __attribute__((noinline)) /* alone it has all registers */
#else
#define INQ_APART static
#endif

/* In the table of shifts, beside a magnitude's exponent: sums are taken out after it. Else there is the shift to the
 * left on the way to the next magnitude, which the lanes have room for. */
#define INQ_TAKE 0x80

typedef struct {
    uint32_t even, odd;
} inq_pair;

/* Adds to four sums, each with 2^15 more, so that nothing is borrowed: the bias subtracts what that makes in the end. */
static inline void inq_take(inq_pair lanes, uint8_t left, uint32_t *sums)
{
    lanes.even += (uint32_t)0x80008000;
    lanes.odd += (uint32_t)0x80008000;
    sums[0] += (lanes.even & 0xffff) << left;
    sums[1] += (lanes.odd & 0xffff) << left;
    sums[2] += lanes.even >> 16 << left;
    sums[3] += lanes.odd >> 16 << left;
}

#endif
