#include "llama-kv-alloc.h"

#include <algorithm>
#include <cmath>

// points at which the loss of a layer is evaluated
static constexpr uint32_t n_points = 256;

// losses this much smaller than the largest one are noise
static constexpr double loss_min_rel = 1e-6;

// least summed loss of all layers, as if what single layers lose added up
//
// between two keep ratios the loss of a layer falls exponentially, above the largest one linearly to 0 at a ratio of 1,
// and below the smallest one it goes on rising as it starts, at most by that much again. the lower convex hull of that replaces it. cells then go to
// the layer whose loss falls the most for a byte, which is optimal for convex losses
class llama_kv_alloc_optimal : public llama_kv_alloc_i {
public:
    llama_kv_alloc_optimal(const llama_kv_alloc_params & params) : n_ctx(params.n_ctx) {
        const auto & curves = params.curves;

        const double loss_min = loss_min_rel*(*std::max_element(curves.loss.begin(), curves.loss.end()));

        hulls.resize(params.n_layers);
        bytes.resize(params.n_layers);

        for (uint32_t il = 0; il < params.n_layers; ++il) {
            bytes[il] = params.cell_bytes.empty() ? 1.0 : params.cell_bytes[il];

            auto & hull = hulls[il];

            for (uint32_t i = 0; i <= n_points; ++i) {
                const double ratio = (double) i/n_points;
                const point  p     = { ratio, loss(curves, il, ratio, loss_min) };

                // drop the points above the line from the one before them to the new one
                while (hull.size() > 1 && slope(hull[hull.size() - 2], hull.back()) >= slope(hull.back(), p)) {
                    hull.pop_back();
                }

                hull.push_back(p);
            }
        }
    }

    double gain(uint32_t il, uint32_t n0, uint32_t n1) const override {
        const auto & hull = hulls[il];

        const double r0 = (double) n0/n_ctx;
        const double r1 = (double) n1/n_ctx;

        // the mean slope between r0 and r1: exactly that of the segment inside of one, so that equal layers grow together
        double res = 0.0;

        const auto it = std::upper_bound(hull.begin() + 1, hull.end() - 1, r0, [](double r, const point & p) {
            return r < p.ratio;
        });

        for (size_t i = it - hull.begin(); i < hull.size() && hull[i - 1].ratio < r1; ++i) {
            const double part = (std::min(r1, hull[i].ratio) - std::max(r0, hull[i - 1].ratio))/(r1 - r0);

            if (part > 1.0 - 1e-9) {
                res = -slope(hull[i - 1], hull[i]);
                break;
            }
            if (part > 0.0) {
                res -= part*slope(hull[i - 1], hull[i]);
            }
        }

        return res/bytes[il];
    }

private:
    struct point {
        double ratio;
        double loss;
    };

    static double slope(const point & a, const point & b) {
        return (b.loss - a.loss)/(b.ratio - a.ratio);
    }

    static double loss(const llama_kv_curves & curves, uint32_t il, double ratio, double loss_min) {
        const auto & ratios = curves.ratios;

        const auto at = [&](size_t i) {
            return std::max<double>(curves.loss[il*ratios.size() + i], loss_min);
        };

        const size_t n    = ratios.size();
        const double last = at(n - 1);

        if (last == 0.0) {
            return 0.0; // so are all of them
        }
        if (ratio >= ratios[n - 1]) {
            return ratio < 1.0 ? last*(1.0 - ratio)/(1.0 - ratios[n - 1]) : 0.0;
        }
        if (n == 1) {
            return last*(1.0 - ratio)/(1.0 - ratios[0]);
        }

        size_t i = 1;
        while (i < n - 1 && ratio > ratios[i]) {
            ++i;
        }

        // close ratios say little about what is far below them
        const double t = std::max(-1.0, (ratio - ratios[i - 1])/(ratios[i] - ratios[i - 1]));

        return at(i - 1)*std::pow(at(i)/at(i - 1), t);
    }

    const uint32_t n_ctx;

    std::vector<std::vector<point>> hulls; // of each layer, by ratio
    std::vector<double>             bytes;
};

llama_kv_alloc_ptr llama_kv_alloc_init_optimal(const llama_kv_alloc_params & params) {
    return std::make_unique<llama_kv_alloc_optimal>(params);
}
