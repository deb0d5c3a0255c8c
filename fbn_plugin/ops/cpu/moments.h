// From sums to the moments of a set, and to the edges of its band.

// What the moments of one set are, and what they normalize with.
struct Set {
    double mean, var, count;
    float lower, upper;
};

// The sums of a set around its mean, and what they were computed from.
struct Total {
    double mean = 0, square = 0, count = 0;
    double around_shift = 0;  // sum of squares around the shifts of the passes

    Total() {}
    Total(double shift, double sum, double square, double count)
        : mean(shift + sum / count), square(square - sum * (sum / count)), count(count), around_shift(square) {}

    // The same of several columns, each summed around a shift of its own. They may lie far apart, and a column of which
    // nothing is kept may have any shift, so they are combined around their common mean.
    Total(const double* sums, const double* squares, const double* counts, const float* shift, int64_t columns) {
        double all = 0;
        for (int64_t c = 0; c < columns; ++c) all += counts[c] * shift[c] + sums[c], count += counts[c];
        mean = all / count;
        for (int64_t c = 0; c < columns; ++c) {
            if (counts[c] == 0) continue;
            const double d = sums[c] / counts[c], from_mean = shift[c] + d - mean;
            square += squares[c] - sums[c] * d + counts[c] * from_mean * from_mean;
            around_shift += squares[c];
        }
    }

    // A variance that is small against the squares that it was computed from has lost its digits: they were taken
    // around a value that is no part of the bulk, such as an outlier that the filter has dropped since.
    bool is_poor() const { return around_shift > (1 + far_from_mean(count)) * square; }

    double var() const { return square > 0 ? square / count : square == square ? 0 : square; }
};

static inline void set_band(Set& s, const Total& t, const Options& o) {
    double sigma = sqrt(t.var() + o.eps);
    // wide enough to hold a value even where the deviation is below the rounding of the mean
    double width = o.t_sigma * sigma, least = sigma + 16 * 1.1920929e-07 * (sigma + fabs(t.mean));
    if (!(width > least)) width = least;
    s.lower = (float)(t.mean - width);
    s.upper = (float)(t.mean + width);
}

static inline void set_moments(Set& s, const Total& t, const Options& o) {
    s.mean = t.mean, s.var = t.var() / o.kappa, s.count = t.count;
}

static inline void report(const Set& s, int64_t i, const Moments& out) {
    out.mean[i] = (float)s.mean;
    out.var[i] = (float)s.var;
    out.lower[i] = s.lower;
    out.upper[i] = s.upper;
    out.count[i] = (float)s.count;
}
