/* Weights as codes, the first in a word's lowest bits; each output begins a word. The smallest layout.
 *
 * Inputs are added up by the code that they meet. Code 2 k is the k-th largest magnitude, 2 k + 1 its negative, the
 * last one zero. In the end the sums of all codes become one, a shift for each magnitude. */

#ifndef INQ_WEIGHTS_H
#define INQ_WEIGHTS_H

#include "inq_lanes.h"

typedef uint32_t inq_code;

typedef struct {
    const inq_code *codes;
    const uint8_t *shifts; /* after each magnitude, from the largest down */
    uint16_t inputs;       /* of one output */
    uint16_t block;        /* so many are added up at a time, a multiple of those in a word */
    uint8_t magnitudes;
    uint8_t bits, each; /* of a code; codes in a word */
} inq_weights_t;

/* inq_network.c says INQ_BITS and INQ_EACH: numbers where all layers have codes of one length; and INQ_CODES, how many
 * codes the longest ones tell apart; INQ_BLOCKS, 1 where all are added up at once. */

#ifdef __OPTIMIZE_SIZE__ /* no loop of its own for whole words, which compilers unroll */
#define INQ_SMALL 1
#else
#define INQ_SMALL 0
#endif

/* Those of linear layers: the same. */
typedef inq_code inq_row_code;
typedef inq_weights_t inq_rows_t;

INQ_APART const inq_code *inq_dot1(const inq_weights_t *weights, const inq_code *codes, const uint8_t *inputs,
                                       uint32_t *sum)
{
    uint32_t bins[INQ_CODES], total = 0;
    const uint32_t mask = ((uint32_t)1 << INQ_BITS) - 1;
    const uint32_t *bin = bins;
    uint_fast16_t left = weights->inputs;
    uint_fast8_t i;
    for (i = 0; i <= mask; ++i)
        bins[i] = 0;
    for (; !INQ_SMALL && left >= INQ_EACH; left -= INQ_EACH) {
        uint32_t word = *codes++;
        for (i = 0; i != INQ_EACH; ++i, word >>= INQ_BITS)
            bins[word & mask] += *inputs++;
    }
    while (left) {
        uint32_t word = *codes++;
        for (i = INQ_EACH; i && left; --i, --left, word >>= INQ_BITS)
            bins[word & mask] += *inputs++;
    }
    for (i = 0; i != weights->magnitudes; ++i, bin += 2)
        total = (total + bin[0] - bin[1]) << (weights->shifts[i]);
    *sum = total;
    return codes;
}

/* What four pixels take of one input: a byte each. */
typedef uint32_t inq_column;

static inline inq_column inq_column_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return a | b << 8 | c << 16 | d << 24;
}

/* Bytes 0 and 2 are added up 16 bits apart; 1, 2 and 3 are 8 bits apart, for 2 is known and can be subtracted. */
static inline void inq_add(inq_pair *bin, inq_column column)
{
    bin->even += column & (uint32_t)0x00ff00ff;
    bin->odd += column >> 8;
}

static inline inq_pair inq_lanes_of(inq_pair sum)
{
    sum.odd += (uint32_t)0x00800000 - ((sum.even + (uint32_t)0x80008000) >> 16 << 8);
    return sum;
}

INQ_APART const inq_code *inq_dot4(const inq_weights_t *weights, const inq_code *codes, const inq_column *columns,
                                   uint32_t *sums)
{
    inq_pair bins[INQ_CODES];
    const uint32_t mask = ((uint32_t)1 << INQ_BITS) - 1;
    uint_fast16_t left = weights->inputs;
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    while (left) {
        uint_fast16_t block = INQ_BLOCKS == 1 || left < weights->block ? left : weights->block;
        inq_pair lanes = {0, 0};
        const inq_pair *bin = bins;
        uint_fast8_t i;
        left -= block;
        for (i = 0; i <= mask; ++i)
            bins[i].even = bins[i].odd = 0;
        for (; !INQ_SMALL && block >= INQ_EACH; block -= INQ_EACH) {
            uint32_t word = *codes++;
            for (i = 0; i != INQ_EACH; ++i, word >>= INQ_BITS)
                inq_add(bins + (word & mask), *columns++);
        }
        while (block) {
            uint32_t word = *codes++;
            for (i = INQ_EACH; i && block; --i, --block, word >>= INQ_BITS)
                inq_add(bins + (word & mask), *columns++);
        }
        for (i = 0; i != weights->magnitudes; ++i, bin += 2) {
            uint_fast8_t shift = weights->shifts[i];
            lanes.even += bin[0].even - bin[1].even;
            lanes.odd += bin[0].odd - bin[1].odd;
            if (shift & INQ_TAKE) {
                inq_take(inq_lanes_of(lanes), shift & 31, sums);
                lanes.even = lanes.odd = 0;
            } else {
                lanes.even <<= shift;
                lanes.odd <<= shift;
            }
        }
    }
    return codes;
}

#endif
