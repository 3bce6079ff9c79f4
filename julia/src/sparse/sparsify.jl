"A part of a network as it is computed in panels and for single samples; `σ` is `nothing` where kernels apply the activation."
struct FastLayer
    panels::Any
    single::Any
    σ::Any
end
FastLayer(kernel, σ = nothing) = FastLayer(kernel, kernel, σ)

"""
    SparseNetwork

What [`sparsify`](@ref) returns: a function of inputs `(features..., n)` or, of a network whose inputs are vectors,
`(features,)`, for inference only. Several tasks may call it at once.
"""
mutable struct SparseNetwork
    const layers::Vector{FastLayer}
    const sizes::Vector{Dims} # of the inputs, and of the outputs of each layer with weights
    const density::Float64
    const vectors::Int # in the widest panel
    const few::Int # samples that take no longer one by one than as a panel
    const scratch::Channel{NTuple{2,Matrix{Float32}}}
end

"Memory that a panel of the largest activations of a convolutional network may take: half of what a core usually has to itself."
const PANEL_BYTES = 2^19

"""
    sparsify(model; kernels = :auto, input_size = nothing) -> SparseNetwork

The network as a function whose work is proportional to the weights that are kept: outputs as those of `model` to
rounding, `(outputs, n)` for inputs `(features, n)`, in `Float32`. For a `Chain` of prunable layers (without `groups`) with, between
them, `BatchNorm`, `Dropout`, pooling and `Flux.flatten`, in test mode; later changes of `model` do not reach it. It uses
the threads that Julia was started with, for batches. If the first layer is a convolution, `input_size` is needed, the size of
a sample `(width, height, channels)`.

A layer that is not sparse enough stays dense. With `:auto` both kernels are timed on random inputs, for batches and for
single samples, and the faster is taken; `:sparse` and `:dense`, for the network or one per layer, force the choice.
Inputs must be finite.

Throws `ArgumentError` for other models and other `kernels`, and `DimensionMismatch` for an `input_size` that does not fit.

# Examples
```jldoctest
julia> model = prune!(prunable(Chain(Dense(784 => 300, relu), Dense(300 => 10))), Magnitude(); sparsity = 0.95);

julia> fast = sparsify(model)
SparseNetwork(784 => 300 => 10; density=0.05)

julia> x = rand(Float32, 784, 100); fast(x) ≈ model(x)
true
```
"""
function sparsify(model; kernels = :auto, input_size = nothing)
    layers, parts = sequence(model)
    parts = foldl(with_part, parts; init = Any[])
    choices = kernels isa Symbol ? fill(kernels, length(layers)) : collect(Symbol, kernels)
    length(choices) == length(layers) && all(in((:auto, :sparse, :dense)), choices) || throw(ArgumentError(
        "kernels must be :auto, :sparse or :dense, or one of these per layer ($(length(layers))), not $kernels"))
    dims = input_dims(parts, input_size)
    fast, sizes = FastLayer[], Dims[dims]
    for part in parts
        made, dims = fast_layers(part, dims, part isa Prunable ? popfirst!(choices) : :auto)
        append!(fast, made)
        part isa Prunable && push!(sizes, dims)
    end
    largest = maximum(layer -> max(inputs(layer.panels), outputs(layer.panels)), fast)
    fitting = any(part -> part isa PrunableConv, parts) ? PANEL_BYTES ÷ (largest * sizeof(Lane)) : MAX_VECTORS
    vectors, buffers = clamp(fitting, 1, MAX_VECTORS), 2 * Threads.nthreads()
    columns = max(largest, cld(buffer_length(largest), vectors * LANES))
    scratch = Channel{NTuple{2,Matrix{Float32}}}(buffers)
    foreach(_ -> put!(scratch, Tuple(zeros(Float32, vectors * LANES, columns) for _ in 1:2)), 1:buffers)
    network(few) = SparseNetwork(fast, sizes, density(model), vectors, few, scratch)
    return network(few_samples(network(0), network(1)))
end

"How many samples take no longer one by one than together: by the best times of both."
function few_samples(in_panels, by_one)
    x = rand(Float32, features(in_panels), 1)
    y = Matrix{Float32}(undef, outputs(in_panels), 1)
    times = [@elapsed(infer!(y, net, x)) for net in (in_panels, by_one), _ in 1:16]
    panel, single = minimum(times; dims = 2)
    return clamp(floor(Int, panel / single), 1, LANES - 1)
end

"The parts and one more, which, if it is a batch normalisation, the layer before may do as well, with other weights."
function with_part(parts, part)
    last_one = isempty(parts) ? nothing : last(parts)
    part isa BatchNorm && part.track_stats && last_one isa Prunable && inner(last_one).σ === identity || return push!(parts, part)
    W, (scale, shift) = weight(last_one), scale_and_shift(part)
    size(W, output_dim(last_one)) == length(scale) || return push!(parts, part) # then it gets its message
    along_outputs = reshape(scale, ntuple(i -> i == output_dim(last_one) ? length(scale) : 1, ndims(W)))
    parts[end] = rebuilt(last_one, W .* along_outputs, last_one.mask; bias = bias(last_one) .* scale .+ shift, σ = part.λ)
    return parts
end

"What batch normalisation multiplies each channel by, and what it adds."
function scale_and_shift((; β, γ, μ, σ², ϵ, affine)::BatchNorm)
    scale = (affine ? γ : 1) ./ sqrt.(σ² .+ ϵ)
    return scale, (affine ? β : 0) .- μ .* scale
end

function input_dims(parts, given)
    isnothing(given) || return map(Int, Tuple(given))
    first_layer = parts[findfirst(part -> part isa Prunable, parts)]
    first_layer isa PrunableDense || throw(ArgumentError(
        "input_size must be given, (width, height, channels) of a sample, for a network whose first layer is a convolution"))
    return (size(first_layer.mask, 2),)
end

"What computes a part for samples of size `dims`, and the size of what comes out."
fast_layers(part, dims, choice) = FastLayer[], dims # of `Dropout` and `identity`
fast_layers(::typeof(Flux.flatten), dims, choice) = FastLayer[], (prod(dims),)

function fast_layers(layer::PrunableDense, dims, choice)
    check_channels(layer, dims, 1, size(layer.mask, 2))
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(Windows(size(W, 2)), W, b, relu)
    rows = SparseRows(W, mask, b, relu)
    of_one = PERMUTES ? (rows, PermutedRows(W, mask, b, relu)) : (rows,)
    panels = fastest(choice, (SparseKernel(W, mask, b, relu),), dense, panel(dense)...)
    single = fastest(choice, of_one, dense, sample(dense)...)
    return [FastLayer(panels, single, σ)], (length(b),)
end

function fast_layers(layer::PrunableConv, dims, choice)
    (; stride, pad, dilation) = layer.conv
    kernel = Base.front(Base.front(size(layer.mask)))
    check_channels(layer, dims, length(kernel) + 1, size(layer.mask, length(kernel) + 1))
    borders, padded = with_borders(dims, pad, 0)
    windows = Windows(padded, kernel, stride, dilation)
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(windows, W, b, relu)
    sparse = SparseWindows(windows, W, mask, b, relu)
    panels, single = fastest(choice, (sparse,), dense, panel(dense)...), fastest(choice, (sparse,), dense, sample(dense)...)
    return [borders; FastLayer(panels, single, σ)], (windows.output..., length(b))
end

function fast_layers(norm::BatchNorm, dims, choice)
    norm.track_stats || throw(ArgumentError("BatchNorm must track its statistics to be sparsified"))
    check_channels(norm, dims, length(dims), norm.chs)
    scale, shift = map(Array{Float32}, scale_and_shift(norm))
    return [FastLayer(Scaling(prod(dims), scale, shift), norm.λ === identity ? nothing : NNlib.fast_act(norm.λ, scale))], dims
end

function fast_layers(pool::Union{Flux.MaxPool,Flux.MeanPool}, dims, choice)
    (; k, pad, stride) = pool
    return pooled(dims, k, pad, stride, pool isa Flux.MeanPool)
end
fast_layers(pool::Union{Flux.GlobalMaxPool,Flux.GlobalMeanPool}, dims, choice) =
    pooled(dims, Base.front(dims), map(zero, Base.front(dims)), map(one, Base.front(dims)), pool isa Flux.GlobalMeanPool)
function fast_layers(pool::Union{Flux.AdaptiveMaxPool,Flux.AdaptiveMeanPool}, dims, choice)
    places = Base.front(dims)
    stride = places .÷ pool.out
    k = places .- (pool.out .- 1) .* stride
    return pooled(dims, k, map(zero, k), stride, pool isa Flux.AdaptiveMeanPool)
end

function pooled(dims, k, pad, stride, mean)
    borders, padded = with_borders(dims, pad, mean ? 0 : -Inf)
    windows = Windows(padded, k, stride, map(one, k))
    return [borders; FastLayer(Pooling(windows, mean))], (windows.output..., last(dims))
end

"A padding, if there is anything to pad, and the size of what comes out."
function with_borders(dims, pad, value)
    n = length(dims) - 1
    before, behind = length(pad) == n ? (pad, pad) : (pad[1:2:end], pad[2:2:end])
    all(iszero, pad) && return FastLayer[], dims
    padded = (Base.front(dims) .+ before .+ behind..., last(dims))
    return [FastLayer(Padding(dims, padded, (before..., 0), value))], padded
end

check_channels(part, dims, n, channels) = length(dims) == n && last(dims) == channels || throw(DimensionMismatch(
    "$(sprint(show, part)) takes $channels $(n == 1 ? "features" : "channels") but gets samples of size $dims"))

"What kernels need of a layer: its weight as a matrix (outputs, taps), mask, bias, whether they apply `relu`, and what they do not."
function for_kernels(layer)
    mask!(layer)
    W, mask = Array{Float32}(taps_matrix(layer, weight(layer))), Array{Bool}(taps_matrix(layer, layer.mask))
    b, σ = bias(layer) === false ? zeros(Float32, size(W, 1)) : Array{Float32}(bias(layer)), inner(layer).σ
    relu = σ === NNlib.relu
    return W, mask, b, relu, relu || σ === identity ? nothing : NNlib.fast_act(σ, W)
end

taps_matrix(::PrunableDense, A) = Array(A)
taps_matrix(layer::PrunableConv, A) = as_matrix(layer, flipped(Array(A)))

"What multiplies fastest, among the `sparse` kernels, the dense one, or all; by its best time in turn with the others."
function fastest(choice, sparse, dense, y, x, width...)
    kernels = choice === :dense ? (dense,) : choice === :sparse ? sparse : (sparse..., dense)
    length(kernels) == 1 && return only(kernels)
    times = [@elapsed(multiply!(y, x, kernel, width...)) for kernel in kernels, _ in 1:16]
    return kernels[argmin(vec(minimum(times; dims = 2)))]
end

"Where the outputs of a kernel for the widest panel go, its inputs, and its width."
panel(kernel) = (zeros(Float32, MAX_VECTORS * LANES, outputs(kernel)), rand(Float32, MAX_VECTORS * LANES, inputs(kernel)),
                 Val(MAX_VECTORS))

"The same for a single sample."
sample(kernel) = zeros(Float32, buffer_length(outputs(kernel))), rand(Float32, buffer_length(inputs(kernel)))

function Base.show(io::IO, net::SparseNetwork)
    print(io, "SparseNetwork(", join(map(dims -> join(dims, "×"), net.sizes), " => "))
    print(io, "; density=", round(net.density; sigdigits = 3), ")")
    return nothing
end
