/* Ghost batch norm for float32 on a CPU. ghost_cpu.py calls it through ctypes. It does not depend on Python or torch.

For each ghost batch of M values of a channel, with mean m and biased variance v (Hoffer et al. 2017, Algorithm 1),

    forward   y  = (x - m) * slope + bias,    slope = weight * inverse,   inverse = 1 / sqrt(v + eps)
    backward  dx = slope * (dy - sum(dy) / M - (x - m) * inverse^2 * sum(dy * (x - m)) / M)

The statistics are m and, as in PyTorch's running statistics, the unbiased variance v * M / (M - 1).

Moments are computed block by block: the block's mean, then sums of differences from it while the block is in the cache
(the "corrected two-pass algorithm" of Chan, Golub & LeVeque 1983). Blocks are combined in double. A large mean
therefore does not cancel the variance, and memory is read only once.

The order of operations on a channel of a ghost batch depends on its shape only, and each operation is rounded
separately (-ffp-contract=off). Results are therefore bit-identical for any other content of the micro-batch, any
division of the work into parts, and any vector width of the processor. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(FOR_EACH_PROCESSOR) /* set by a test */
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
/* One binary for all processors: the loader chooses the variant for the present one. */
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum {
    WIDE = 64,           /* channels processed together in channels_last: their sums stay in registers */
    BLOCK_PIXELS = 64,   /* with WIDE channels 16 KB, half of a first-level cache */
    LANES = 32,          /* parallel sums in a row of pixels */
    BLOCK_VALUES = 8192, /* of one channel */
};

/* Some ghost batches and channels of an input (groups * samples, channels, pixels). Must match ghost_cpu.py. */
typedef struct {
    int64_t samples; /* of a ghost batch */
    int64_t channels, pixels;
    int64_t channels_last, relu;
    int64_t first_group, end_group;
    int64_t first_channel, end_channel;
} Part;

/* Some channels of one ghost batch: rows of up to WIDE channels (channels_last), or of the pixels of one channel. */
typedef struct {
    int64_t rows, stride, pixels; /* pixels of a row */
    int64_t begin;                /* offset of the first value in x, y, dx and dy */
    float mean[WIDE], slope[WIDE], offset[WIDE];
    float per_value[WIDE], per_difference[WIDE]; /* backward subtracts these from each gradient */
    int relu;
    float floor; /* least output; NaN without a ReLU, so that no output is below it */
} Slice;

/* Mean and sum of squared differences from it; or sums of dy * (x - mean) and of dy. */
typedef struct {
    double first[WIDE], second[WIDE];
} Sums;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- one value --------------------------------------------------------------------------------------------------- */

INLINE float normalized(const Slice *s, int i, float x)
{
    const float y = (x - s->mean[i]) * s->slope[i] + s->offset[i];
    return y < s->floor ? s->floor : y; /* NaN stays NaN */
}

/* Gradient before the ReLU. The ReLU's input is computed with the same rounding as in forward. */
INLINE float upstream(const Slice *s, int i, float dy, float x)
{
    return s->relu && (x - s->mean[i]) * s->slope[i] + s->offset[i] <= 0.0f ? 0.0f : dy;
}

INLINE float differentiated(const Slice *s, int i, float dy, float x)
{
    return s->slope[i] * (upstream(s, i, dy, x) - (x - s->mean[i]) * s->per_difference[i] - s->per_value[i]);
}

/* Combines the moments of `before` values with those of a block, given the sums of the block's differences from a
center and of their squares. */
INLINE void join(Sums *moments, int i, double before, double count, double center, double sum, double squares)
{
    const double off = sum / count, difference = center + off - moments->first[i], share = count / (before + count);
    moments->first[i] += difference * share;
    moments->second[i] += squares - sum * off + difference * difference * before * share;
}

/* --- channels_last ----------------------------------------------------------------------------------------------- */

INLINE void find_moments_of_columns(const Slice *s, const float *x, Sums *moments, const int width)
{
    for (int64_t first = 0; first < s->rows; first += BLOCK_PIXELS) {
        const int64_t count = least(BLOCK_PIXELS, s->rows - first);
        const float *block = x + first * s->stride;
        float center[WIDE] = {0}, sum[WIDE] = {0}, squares[WIDE] = {0};
        for (int64_t row = 0; row < count; row++)
            for (int i = 0; i < width; i++)
                center[i] += block[row * s->stride + i];
        for (int i = 0; i < width; i++)
            center[i] /= (float)count;
        for (int64_t row = 0; row < count; row++)
            for (int i = 0; i < width; i++) {
                const float difference = block[row * s->stride + i] - center[i];
                sum[i] += difference;
                squares[i] += difference * difference;
            }
        for (int i = 0; i < width; i++)
            join(moments, i, (double)first, (double)count, center[i], sum[i], squares[i]);
    }
}

INLINE void normalize_columns(const Slice *s, const float *x, float *y, const int width)
{
    for (int64_t row = 0; row < s->rows; row++)
        for (int i = 0; i < width; i++)
            y[row * s->stride + i] = normalized(s, i, x[row * s->stride + i]);
}

INLINE void sum_columns(const Slice *s, const float *x, const float *dy, Sums *sums, const int width)
{
    for (int64_t first = 0; first < s->rows; first += BLOCK_PIXELS) {
        const int64_t end = least(first + BLOCK_PIXELS, s->rows);
        float dot[WIDE] = {0}, total[WIDE] = {0};
        for (int64_t row = first; row < end; row++)
            for (int i = 0; i < width; i++) {
                const float value = x[row * s->stride + i];
                const float gradient = upstream(s, i, dy[row * s->stride + i], value);
                dot[i] += gradient * (value - s->mean[i]);
                total[i] += gradient;
            }
        for (int i = 0; i < width; i++) {
            sums->first[i] += dot[i];
            sums->second[i] += total[i];
        }
    }
}

INLINE void differentiate_columns(const Slice *s, const float *x, const float *dy, float *dx, const int width)
{
    for (int64_t row = 0; row < s->rows; row++)
        for (int i = 0; i < width; i++) {
            const int64_t at = row * s->stride + i;
            dx[at] = differentiated(s, i, dy[at], x[at]);
        }
}

/* --- contiguous: a row is one channel's pixels of one sample ------------------------------------------------------ */

INLINE double added(const float *lanes)
{
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += lanes[i];
    return sum;
}

INLINE void add_pixels(const float *x, float *sum, const int count)
{
    for (int i = 0; i < count; i++)
        sum[i] += x[i];
}

INLINE void add_differences(const float *x, float center, float *sum, float *squares, const int count)
{
    for (int i = 0; i < count; i++) {
        const float difference = x[i] - center;
        sum[i] += difference;
        squares[i] += difference * difference;
    }
}

INLINE void add_products(const Slice *s, const float *x, const float *dy, float *dot, float *total, const int count)
{
    for (int i = 0; i < count; i++) {
        const float gradient = upstream(s, 0, dy[i], x[i]);
        dot[i] += gradient * (x[i] - s->mean[0]);
        total[i] += gradient;
    }
}

/* Number of rows in a block, whose sums are float. */
INLINE int64_t rows_of_block(const Slice *s) { return s->pixels < BLOCK_VALUES ? BLOCK_VALUES / s->pixels : 1; }

INLINE void find_moments_of_rows(const Slice *s, const float *x, Sums *moments)
{
    const int64_t whole = s->pixels / LANES * LANES;
    for (int64_t first = 0; first < s->rows; first += rows_of_block(s)) {
        const int64_t end = least(first + rows_of_block(s), s->rows);
        const double count = (double)((end - first) * s->pixels);
        float values[LANES] = {0}, sum[LANES] = {0}, squares[LANES] = {0};
        for (const float *row = x + first * s->stride; row < x + end * s->stride; row += s->stride) {
            for (int64_t p = 0; p < whole; p += LANES)
                add_pixels(row + p, values, LANES);
            add_pixels(row + whole, values, (int)(s->pixels - whole));
        }
        const float center = (float)(added(values) / count);
        for (const float *row = x + first * s->stride; row < x + end * s->stride; row += s->stride) {
            for (int64_t p = 0; p < whole; p += LANES)
                add_differences(row + p, center, sum, squares, LANES);
            add_differences(row + whole, center, sum, squares, (int)(s->pixels - whole));
        }
        join(moments, 0, (double)(first * s->pixels), count, center, added(sum), added(squares));
    }
}

INLINE void normalize_rows(const Slice *s, const float *x, float *y)
{
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t p = 0; p < s->pixels; p++)
            y[row * s->stride + p] = normalized(s, 0, x[row * s->stride + p]);
}

INLINE void sum_rows(const Slice *s, const float *x, const float *dy, Sums *sums)
{
    const int64_t whole = s->pixels / LANES * LANES;
    for (int64_t first = 0; first < s->rows; first += rows_of_block(s)) {
        const int64_t end = least(first + rows_of_block(s), s->rows);
        float dot[LANES] = {0}, total[LANES] = {0};
        for (int64_t begin = first * s->stride; begin < end * s->stride; begin += s->stride) {
            for (int64_t p = begin; p < begin + whole; p += LANES)
                add_products(s, x + p, dy + p, dot, total, LANES);
            add_products(s, x + begin + whole, dy + begin + whole, dot, total, (int)(s->pixels - whole));
        }
        sums->first[0] += added(dot);
        sums->second[0] += added(total);
    }
}

INLINE void differentiate_rows(const Slice *s, const float *x, const float *dy, float *dx)
{
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t p = 0; p < s->pixels; p++) {
            const int64_t at = row * s->stride + p;
            dx[at] = differentiated(s, 0, dy[at], x[at]);
        }
}

/* --- a slice, and a part by slices -------------------------------------------------------------------------------- */

/* Number of channels of the slice that begins with `channel`. */
INLINE int width_of(const Part *part, int64_t channel)
{
    return part->channels_last ? (int)least(WIDE, part->end_channel - channel) : 1;
}

INLINE Slice slice_of(const Part *part, int64_t group, int64_t channel, const int relu)
{
    const int64_t of_group = part->samples * part->pixels * part->channels;
    Slice s;
    s.relu = relu;
    s.floor = relu ? 0.0f : NAN;
    s.pixels = part->pixels;
    s.rows = part->channels_last ? part->samples * part->pixels : part->samples;
    s.stride = part->channels_last ? part->channels : part->channels * part->pixels;
    s.begin = group * of_group + (part->channels_last ? channel : channel * part->pixels);
    return s;
}

/* Calls a function of columns with a constant WIDE where possible: the compiler unrolls only constant widths. */
#define BY_WIDTH(function, width, ...)                                                                                 \
    do {                                                                                                               \
        if ((width) == WIDE)                                                                                           \
            function(__VA_ARGS__, WIDE);                                                                               \
        else                                                                                                           \
            function(__VA_ARGS__, width);                                                                              \
    } while (0)

INLINE void differentiate(const Part *part, const float *x, const float *dy, const float *weight, const float *bias,
                          const float *statistics, const float *inverses, float *dx, float *sums, const int relu)
{
    const int64_t channels = part->channels;
    const double count = (double)(part->samples * part->pixels);
    for (int64_t group = part->first_group; group < part->end_group; group++)
        for (int64_t c = part->first_channel; c < part->end_channel; c += width_of(part, c)) {
            const int width = width_of(part, c);
            Slice s = slice_of(part, group, c, relu);
            for (int i = 0; i < width; i++) {
                const float inverse = inverses[group * channels + c + i];
                s.mean[i] = statistics[2 * group * channels + c + i];
                s.slope[i] = weight ? inverse * weight[c + i] : inverse;
                s.offset[i] = bias ? bias[c + i] : 0.0f;
            }
            Sums of_slice = {0};
            if (part->channels_last)
                BY_WIDTH(sum_columns, width, &s, x + s.begin, dy + s.begin, &of_slice);
            else
                sum_rows(&s, x + s.begin, dy + s.begin, &of_slice);
            for (int i = 0; i < width; i++) {
                const double inverse = inverses[group * channels + c + i], dot = of_slice.first[i] * inverse;
                sums[2 * group * channels + c + i] = (float)dot;
                sums[(2 * group + 1) * channels + c + i] = (float)of_slice.second[i];
                s.per_difference[i] = (float)(dot * inverse / count);
                s.per_value[i] = (float)(of_slice.second[i] / count);
            }
            if (part->channels_last)
                BY_WIDTH(differentiate_columns, width, &s, x + s.begin, dy + s.begin, dx + s.begin);
            else
                differentiate_rows(&s, x + s.begin, dy + s.begin, dx + s.begin);
        }
}

/* --- entry points ------------------------------------------------------------------------------------------------- */

/* Computes output (like x), statistics (groups, 2, channels) and inverse deviations (groups, channels) of a part.
Weight and bias (channels) may be NULL, for 1 and 0. */
FOR_EACH_PROCESSOR void ghost_normalize(const Part *part, double eps, const float *x, const float *weight,
                                        const float *bias, float *y, float *statistics, float *inverses)
{
    const int64_t channels = part->channels;
    const double count = (double)(part->samples * part->pixels);
    for (int64_t group = part->first_group; group < part->end_group; group++)
        for (int64_t c = part->first_channel; c < part->end_channel; c += width_of(part, c)) {
            const int width = width_of(part, c);
            Slice s = slice_of(part, group, c, (int)part->relu);
            Sums moments = {0};
            if (part->channels_last)
                BY_WIDTH(find_moments_of_columns, width, &s, x + s.begin, &moments);
            else
                find_moments_of_rows(&s, x + s.begin, &moments);
            for (int i = 0; i < width; i++) {
                const float inverse = (float)(1.0 / sqrt(moments.second[i] / count + eps));
                statistics[2 * group * channels + c + i] = s.mean[i] = (float)moments.first[i];
                statistics[(2 * group + 1) * channels + c + i] = (float)(moments.second[i] / (count - 1));
                inverses[group * channels + c + i] = inverse;
                s.slope[i] = weight ? inverse * weight[c + i] : inverse;
                s.offset[i] = bias ? bias[c + i] : 0.0f;
            }
            if (part->channels_last)
                BY_WIDTH(normalize_columns, width, &s, x + s.begin, y + s.begin);
            else
                normalize_rows(&s, x + s.begin, y + s.begin);
        }
}

/* Computes the gradient of x (like x), and sums (groups, 2, channels): each ghost batch's part of the gradients of
weight and bias. */
FOR_EACH_PROCESSOR void ghost_differentiate(const Part *part, const float *x, const float *dy, const float *weight,
                                            const float *bias, const float *statistics, const float *inverses,
                                            float *dx, float *sums)
{
    if (part->relu)
        differentiate(part, x, dy, weight, bias, statistics, inverses, dx, sums, 1);
    else
        differentiate(part, x, dy, weight, bias, statistics, inverses, dx, sums, 0);
}
