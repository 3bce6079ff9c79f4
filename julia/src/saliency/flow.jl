"""
    SynFlow(; iterations = 100)

Synaptic flow: `|w| * ∂R/∂|w|` with `R = 1ᵀ |W_L| ⋯ |W_1| 1`, the sum of the outputs for an input of ones of the
network with absolute weights, no biases and no activations (Tanaka et al. 2020, arXiv:2006.05467). Needs no data, unless the
size of the inputs is not known from the first layer, a convolution. Pruned
in `iterations` steps, the density falling exponentially, scored anew in each, it keeps every layer alive as long as
that is possible.
"""
Base.@kwdef struct SynFlow
    iterations::Int = 100
end

iterations(criterion::SynFlow) = criterion.iterations

function saliency(::SynFlow, model, data...)
    flow = Flux.testmode!(Flux.f64(deepcopy(with_layers(linear, model))))
    x = fill!(similar(first(weights(flow)), sample_size(first(prunables(flow)), data...)..., 1), 1)
    return map((W, g) -> W .* g, weights(flow), weight_gradients(m -> sum(forward(m, x)), flow))
end

sample_size(layer, data) = size(first(data))[1:(end - 1)]
sample_size(layer::PrunableDense) = size(layer, 2)
sample_size(layer::PrunableConv) = throw(ArgumentError("SynFlow needs data (x, y) to know the size of a convolution's inputs"))

linear(layer) = rebuilt(layer, mask!(abs.(Float64.(weight(layer))), layer.mask), layer.mask; bias = false, σ = identity)
