/* What a network of whole numbers computes with: additions, shifts, comparisons, loads and stores. No multiplication,
 * no division, no floating point, no library. C99, included by inq_network.c alone.
 *
 * A value is an array of bytes, each a whole number plus `zero` (0 or 128), or of int32_t where 8 bits do not hold it;
 * channels come first, then rows, then columns. Sums are uint32_t, modulo 2^32, in which a shift to the left is defined
 * for negative numbers too; the result of every sum fits 32 bits with its sign. Places in arrays are found by adding. */

#ifndef INQ_KERNELS_H
#define INQ_KERNELS_H

#include <stdint.h>

/* ---- values ------------------------------------------------------------------------------------------------------ */

typedef struct {
    void *data;   /* uint8_t, or int32_t if wide; the image's is only read */
    uint8_t zero; /* what stands for 0 in a byte */
    uint8_t wide;
} inq_value;

static inline int32_t inq_signed(uint32_t number)
{
    return number >> 31 ? -1 - (int32_t)~number : (int32_t)number;
}

/* Whether there is a value that is wide and that something reads; inq_network.c says so. */
#ifndef INQ_WIDE
#define INQ_WIDE 1
#endif

static inline int32_t inq_get(const inq_value *value, uint32_t place)
{
    return INQ_WIDE && value->wide ? ((const int32_t *)value->data)[place]
                       : (int32_t)((const uint8_t *)value->data)[place] - value->zero;
}

static inline void inq_put(const inq_value *value, uint32_t place, int32_t number)
{
    if (value->wide)
        ((int32_t *)value->data)[place] = number;
    else
        ((uint8_t *)value->data)[place] = (uint8_t)(number + value->zero);
}

/* ---- from a sum to a result -------------------------------------------------------------------------------------- */

/* ((± sum << left, once for each term) + bias) >> right, rounded half to even, at least low, at most high. */
typedef struct {
    const uint32_t *bias;  /* one a channel */
    const uint8_t *shifts; /* for each channel: right, then the terms: left, + 32 to subtract, or 64 for none */
    uint8_t terms;
    uint8_t shared; /* one scaling for all channels */
    int32_t low;    /* at most 0 */
    int32_t high;   /* at least 0 */
} inq_scaling;

/* Where one is, channel by channel. */
typedef struct {
    const uint32_t *bias;
    const uint8_t *shifts;
} inq_channel;

static inline inq_channel inq_first(const inq_scaling *scaling)
{
    inq_channel channel = {scaling->bias, scaling->shifts};
    return channel;
}

static inline void inq_next(const inq_scaling *scaling, inq_channel *channel)
{
    if (!scaling->shared) {
        channel->bias += 1;
        channel->shifts += scaling->terms + 1;
    }
}

static int32_t inq_finish(const inq_scaling *scaling, const inq_channel *channel, uint32_t sum)
{
    const uint8_t *term = channel->shifts, *end = term + scaling->terms;
    uint32_t total = *channel->bias, most = (uint32_t)scaling->high;
    uint_fast8_t right = *term, negative;
    while (term != end) {
        uint_fast8_t left = *++term;
        if (left < 32)
            total += sum << left;
        else if (left < 64)
            total -= sum << (left & 31);
    }
    negative = total >> 31 != 0;
    if (negative) { /* no negative number is shifted to the right: half to even is the same on both sides of 0 */
        total = 0 - total;
        most = 0 - (uint32_t)scaling->low;
    }
    if (right)
        total = (total + ((total >> right) & 1) + ((uint32_t)1 << (right - 1)) - 1) >> right;
    if (total > most)
        total = most;
    return inq_signed(negative ? 0 - total : total);
}

/* ---- one or two values, number by number ------------------------------------------------------------------------- */

typedef struct {
    inq_scaling scaling;
    uint16_t channels;
    uint32_t size; /* numbers a channel */
    uint8_t lefts[2];
} inq_sum_t;

/* y = scaled((a << lefts[0]) + (b << lefts[1])); without b, scaled(a). */
static inline void inq_sum(const inq_sum_t *op, const inq_value *a, const inq_value *b, const inq_value *y)
{
    inq_channel channel = inq_first(&op->scaling);
    uint32_t place = 0, end = 0;
    uint_fast16_t c;
    for (c = 0; c != op->channels; ++c) {
        for (end += op->size; place != end; ++place) {
            uint32_t sum = (uint32_t)inq_get(a, place) << op->lefts[0];
            if (b)
                sum += (uint32_t)inq_get(b, place) << op->lefts[1];
            inq_put(y, place, inq_finish(&op->scaling, &channel, sum));
        }
        inq_next(&op->scaling, &channel);
    }
}

/* ---- windows ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const inq_scaling *scaling; /* of the window's sum; none for its maximum */
    int32_t least;              /* what a maximum begins with */
    uint16_t channels, height, width;
    uint16_t rows, columns; /* of the result */
    uint16_t kernel[2], stride[2], dilation[2];
    uint16_t padding[2];
    uint32_t plane;      /* height · width */
    uint32_t first;      /* place of the first window's first number: -padding[0] · width - padding[1] */
    uint32_t row_stride; /* stride[0] · width */
    uint32_t row_step;   /* dilation[0] · width */
} inq_window_t;

/* Where all windows are alike in something, inq_network.c says it as a number, and the compiler leaves out the rest. */
#ifndef INQ_WINDOW_KERNEL
#define INQ_WINDOW_KERNEL(axis) op->kernel[axis]
#endif
#ifndef INQ_WINDOW_STRIDE
#define INQ_WINDOW_STRIDE(axis) op->stride[axis]
#endif
#ifndef INQ_WINDOW_DILATION
#define INQ_WINDOW_DILATION(axis) op->dilation[axis]
#endif
#ifndef INQ_WINDOW_PADDING
#define INQ_WINDOW_PADDING(axis) op->padding[axis]
#endif
#ifndef INQ_WINDOW_SCALING
#define INQ_WINDOW_SCALING op->scaling
#endif

static inline void inq_window(const inq_window_t *op, const inq_value *x, const inq_value *y)
{
    inq_channel channel = {0, 0};
    uint32_t to = 0, base = op->first;
    uint_fast16_t c, row, column, ky, kx;
    if (INQ_WINDOW_SCALING)
        channel = inq_first(INQ_WINDOW_SCALING);
    for (c = 0; c != op->channels; ++c, base += op->plane) {
        uint32_t start = base, top = 0 - (uint32_t)INQ_WINDOW_PADDING(0);
        for (row = 0; row != op->rows; ++row, start += op->row_stride, top += INQ_WINDOW_STRIDE(0)) {
            uint32_t corner = start, left = 0 - (uint32_t)INQ_WINDOW_PADDING(1);
            for (column = 0; column != op->columns; ++column) {
                int32_t largest = op->least;
                uint32_t sum = 0, line = corner, down = top;
                for (ky = 0; ky != INQ_WINDOW_KERNEL(0); ++ky, down += INQ_WINDOW_DILATION(0), line += op->row_step) {
                    uint32_t place = line, right = left;
                    for (kx = 0; kx != INQ_WINDOW_KERNEL(1); ++kx) {
                        if (down < op->height && right < op->width) {
                            int32_t number = inq_get(x, place);
                            sum += (uint32_t)number;
                            if (number > largest)
                                largest = number;
                        }
                        right += INQ_WINDOW_DILATION(1);
                        place += INQ_WINDOW_DILATION(1);
                    }
                }
                inq_put(y, to++, INQ_WINDOW_SCALING ? inq_finish(INQ_WINDOW_SCALING, &channel, sum) : largest);
                corner += INQ_WINDOW_STRIDE(1);
                left += INQ_WINDOW_STRIDE(1);
            }
        }
        if (INQ_WINDOW_SCALING)
            inq_next(INQ_WINDOW_SCALING, &channel);
    }
}

/* ---- moving numbers ---------------------------------------------------------------------------------------------- */

typedef struct {
    uint16_t counts[4];
    uint32_t from, to;                     /* places of the first number */
    uint32_t from_steps[4], to_steps[4]; /* from one number to the next, modulo 2^32 */
    uint8_t left;
} inq_copy_t;

static inline void inq_copy(const inq_copy_t *op, const inq_value *x, const inq_value *y)
{
    uint32_t from0 = op->from, to0 = op->to;
    uint_fast16_t i, j, k, l;
    for (i = 0; i != op->counts[0]; ++i, from0 += op->from_steps[0], to0 += op->to_steps[0]) {
        uint32_t from1 = from0, to1 = to0;
        for (j = 0; j != op->counts[1]; ++j, from1 += op->from_steps[1], to1 += op->to_steps[1]) {
            uint32_t from2 = from1, to2 = to1;
            for (k = 0; k != op->counts[2]; ++k, from2 += op->from_steps[2], to2 += op->to_steps[2]) {
                uint32_t from3 = from2, to3 = to2;
                for (l = 0; l != op->counts[3]; ++l, from3 += op->from_steps[3], to3 += op->to_steps[3])
                    inq_put(y, to3, inq_signed((uint32_t)inq_get(x, from3) << op->left));
            }
        }
    }
}

static inline void inq_clear(const inq_value *y, uint32_t size)
{
    uint32_t place;
    for (place = 0; place != size; ++place)
        inq_put(y, place, 0);
}

/* A wide value as so many values of bytes: x + zero = the sum of planes[p] << 8 p. */
static inline void inq_split(const inq_value *x, uint32_t size, uint32_t zero, uint8_t count, uint8_t *planes)
{
    uint8_t shift = 0;
    for (; count; --count, shift += 8) {
        uint32_t place;
        for (place = 0; place != size; ++place)
            *planes++ = (uint8_t)(((uint32_t)inq_get(x, place) + zero) >> shift);
    }
}

#endif
