"A kernel, and the activation where it does not apply that itself."
struct FastLayer
    kernel::Any
    σ::Any
end

"The kernels that a part of a network may be computed with, in panels and for single samples."
struct Candidates
    panels::Tuple
    single::Tuple
    σ::Any
end
Candidates(kernel, σ = nothing) = Candidates((kernel,), (kernel,), σ)

"""
    SparseNetwork

What [`sparsify`](@ref) returns: a function of inputs `(features..., n)` or, of a network whose inputs are vectors,
`(features,)`, for inference only. Several tasks may call it at once.
"""
mutable struct SparseNetwork
    const panels::Vector{FastLayer}
    const single::Vector{FastLayer}
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

The network as a function whose work is proportional to the weights that are kept, but for those of neurons without consequence,
which [`compact`](@ref) takes out: outputs as those of `model` to rounding, `(outputs, n)` for inputs `(features, n)`, in
`Float32`. For a `Chain` of prunable layers (without `groups`) with, between
them, `BatchNorm`, `Dropout`, pooling and `Flux.flatten`, in test mode; later changes of `model` do not reach it. It uses
the threads that Julia was started with, for batches. If the first layer is a convolution, `input_size` is needed, the size of
a sample `(width, height, channels)`.

A layer that is not sparse enough stays dense. With `:auto` both kernels are timed on random inputs, for batches and for
single samples, and the faster is taken; `:sparse` and `:dense`, for the network or one per layer, force the choice.

The function throws `DimensionMismatch` for inputs of another size, and `ArgumentError` for inputs that are not finite.

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
    layers, _ = sequence(model)
    parts = foldl(with_part, last(sequence(compact(model))); init = Any[])
    choices = kernels isa Symbol ? fill(kernels, length(layers)) : kernels
    length(choices) == length(layers) && all(in((:auto, :sparse, :dense)), choices) || throw(ArgumentError(
        "kernels must be :auto, :sparse or :dense, or one of these per layer ($(length(layers))), not $(repr(kernels))"))
    choices = collect(Symbol, choices)
    dims = input_dims(parts, input_size)
    possible, sizes = Candidates[], Dims[dims]
    for part in parts
        made, dims = candidates(part, dims, part isa Prunable ? choices[length(sizes)] : :auto)
        append!(possible, made)
        part isa Prunable && push!(sizes, (Base.front(dims)..., size(layers[length(sizes)].mask, output_dim(part))))
    end
    kernels_of_panels = foldl(with_pooling, possible; init = Tuple[])
    largest = maximum(((kernels, _),) -> max(inputs(first(kernels)), room(first(kernels))), kernels_of_panels)
    fitting = any(part -> part isa PrunableConv, parts) ? PANEL_BYTES ÷ (largest * sizeof(Lane)) : PANEL_VECTORS
    vectors, buffers = clamp(fitting, 1, PANEL_VECTORS), 2 * Threads.nthreads()
    panels = [FastLayer(fastest_panel(kernels, vectors), σ) for (kernels, σ) in kernels_of_panels]
    single = [FastLayer(fastest_single(part.single, part.panels[1]), part.σ) for part in possible]
    columns = max(largest, cld(maximum(part -> buffer_length(part.panels[1]), possible), vectors * LANES))
    scratch = Channel{NTuple{2,Matrix{Float32}}}(buffers)
    foreach(_ -> put!(scratch, Tuple(zeros(Float32, vectors * LANES, columns) for _ in 1:2)), 1:buffers)
    network(few) = SparseNetwork(panels, single, sizes, density(model), vectors, few, scratch)
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

"What may compute a part for samples of size `dims`, and the size of what comes out."
candidates(part, dims, choice) = Candidates[], dims # of `Dropout` and `identity`
candidates(::typeof(Flux.flatten), dims, choice) = Candidates[], (prod(dims),)

function candidates(layer::PrunableDense, dims, choice)
    check_channels(layer, dims, 1, size(layer.mask, 2))
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(Windows(size(W, 2)), W, b, relu)
    rows = SparseRows(W, mask, b, relu)
    of_one = AVX512 ? (rows, PermutedRows(W, mask, b, relu)) : (rows,)
    panels, single = among(choice, (SparseKernel{HIGH}(W, mask, b, relu),), dense), among(choice, of_one, dense)
    return [Candidates(panels, single, σ)], (length(b),)
end

function candidates(layer::PrunableConv, dims, choice)
    (; stride, pad, dilation) = layer.conv
    kernel = Base.front(Base.front(size(layer.mask)))
    check_channels(layer, dims, length(kernel) + 1, size(layer.mask, length(kernel) + 1))
    borders, padded, plane = with_borders(dims, pad, 0)
    windows = Windows(padded, kernel, stride, dilation, plane)
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(windows, W, b, relu)
    panels, single = map(kind -> among(choice, (kind(windows, W, mask, b, relu),), dense), (SparseWindows, SparsePlaces))
    return [borders; Candidates(panels, single, σ)], (windows.output..., length(b))
end

function candidates(norm::BatchNorm, dims, choice)
    norm.track_stats || throw(ArgumentError("BatchNorm must track its statistics to be sparsified"))
    check_channels(norm, dims, length(dims), norm.chs)
    scale, shift = map(Array{Float32}, scale_and_shift(norm))
    return [Candidates(Scaling(prod(dims), scale, shift), norm.λ === identity ? nothing : NNlib.fast_act(norm.λ, scale))], dims
end

function candidates(pool::Union{Flux.MaxPool,Flux.MeanPool}, dims, choice)
    (; k, pad, stride) = pool
    return pooled(dims, k, pad, stride, pool isa Flux.MeanPool)
end
candidates(pool::Union{Flux.GlobalMaxPool,Flux.GlobalMeanPool}, dims, choice) =
    pooled(dims, Base.front(dims), map(zero, Base.front(dims)), map(one, Base.front(dims)), pool isa Flux.GlobalMeanPool)
function candidates(pool::Union{Flux.AdaptiveMaxPool,Flux.AdaptiveMeanPool}, dims, choice)
    places = Base.front(dims)
    stride = places .÷ pool.out
    k = places .- (pool.out .- 1) .* stride
    return pooled(dims, k, map(zero, k), stride, pool isa Flux.AdaptiveMeanPool)
end

function pooled(dims, k, pad, stride, mean)
    borders, padded, plane = with_borders(dims, pad, mean ? 0 : -Inf)
    windows = Windows(padded, k, stride, map(one, k), plane)
    return [borders; Candidates(Pooling(windows, mean))], (windows.output..., last(dims))
end

"A padding, if there is anything to pad, the size of what comes out, and how far apart its channels are."
function with_borders(dims, pad, value)
    n = length(dims) - 1
    before, behind = length(pad) == n ? (pad, pad) : (pad[1:2:end], pad[2:2:end])
    all(iszero, pad) && return Candidates[], dims, prod(Base.front(dims))
    padded = (Base.front(dims) .+ before .+ behind..., last(dims))
    plane = prod(Base.front(padded)) | 1 # odd, so that channels do not compete for the same places of the cache
    return [Candidates(Padding(dims, padded, plane, before, value))], padded, plane
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

"The `sparse` kernels, the dense one, or all."
among(choice, sparse, dense) = choice === :dense ? (dense,) : choice === :sparse ? sparse : (sparse..., dense)

"Of parts, the kernels for panels and activations, and of one more, which, if it is pooling, the convolution before it does too."
function with_pooling(parts, part)
    (pool,), (kernels, σ) = part.panels, isempty(parts) ? ((nothing,), nothing) : last(parts)
    fits = pool isa Pooling && isnothing(σ) && all(kernel -> kernel isa Union{DenseKernel,SparseWindows}, kernels)
    fits && can_pool_rows(pool.windows) || return push!(parts, (part.panels, part.σ))
    (; input, size, stride) = pool.windows
    rows = Pooling(Windows((input[1], size[2], input[3]), size, stride, (1, 1), input[1] * size[2]), pool.mean)
    parts[end] = map(kernel -> PooledWindows(kernel, rows, stride[2]), kernels), nothing
    return parts
end

"Whether windows are over images that are not padded, and no row is under two of them."
can_pool_rows((; input, plane, size, stride)) = length(input) == 3 && plane == input[1] * input[2] && stride[2] >= size[2]

fastest_panel(kernels, vectors) =
    fastest(kernels, multiply_panel!, zeros(Float32, vectors * LANES, room(first(kernels))),
            rand(Float32, vectors * LANES, inputs(first(kernels))), vectors * LANES)
fastest_single(kernels, of_panel) =
    fastest(kernels, multiply!, zeros(Float32, buffer_length(of_panel)), rand(Float32, buffer_length(of_panel)))

"The kernel that `multiply` takes the least time with, by its best time in turn with the others."
function fastest(kernels::Tuple, multiply, y, x, width...)
    length(kernels) == 1 && return only(kernels)
    times = [@elapsed(multiply(y, x, kernel, width...)) for kernel in kernels, _ in 1:16]
    return kernels[argmin(vec(minimum(times; dims = 2)))]
end

function Base.show(io::IO, net::SparseNetwork)
    print(io, "SparseNetwork(", join(map(dims -> join(dims, "×"), net.sizes), " => "))
    print(io, "; density=", round(net.density; sigdigits = 3), ")")
    return nothing
end
