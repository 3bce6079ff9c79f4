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
    choices = kernels isa Symbol ? fill(kernels, length(layers)) : collect(Symbol, kernels)
    length(choices) == length(layers) && all(in((:auto, :sparse, :dense)), choices) || throw(ArgumentError(
        "kernels must be :auto, :sparse or :dense, or one of these per layer ($(length(layers))), not $kernels"))
    size = input_dims(parts, input_size)
    fast, sizes = FastLayer[], Dims[size]
    for part in parts
        made, size = fast_layers(part, size, part isa Prunable ? popfirst!(choices) : :auto)
        append!(fast, made)
        part isa Prunable && push!(sizes, size)
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

function input_dims(parts, given)
    isnothing(given) || return map(Int, Tuple(given))
    first_layer = parts[findfirst(part -> part isa Prunable, parts)]
    first_layer isa PrunableDense || throw(ArgumentError(
        "input_size must be given, (width, height, channels) of a sample, for a network whose first layer is a convolution"))
    return (Base.size(first_layer.mask, 2),)
end

"What computes a part for samples of the given size, and the size of what comes out."
fast_layers(part, size, choice) = FastLayer[], size # of `Dropout` and `identity`
fast_layers(::typeof(Flux.flatten), size, choice) = FastLayer[], (prod(size),)

function fast_layers(layer::PrunableDense, size, choice)
    check_channels(layer, size, 1, Base.size(layer.mask, 2))
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(Windows(Base.size(W, 2)), W, b, relu)
    rows = SparseRows(W, mask, b, relu)
    of_one = PERMUTES ? (rows, PermutedRows(W, mask, b, relu)) : (rows,)
    panels = fastest(choice, (SparseKernel(W, mask, b, relu),), dense, panel(dense)...)
    single = fastest(choice, of_one, dense, sample(dense)...)
    return [FastLayer(panels, single, σ)], (length(b),)
end

function fast_layers(layer::PrunableConv, size, choice)
    (; stride, pad, dilation) = layer.conv
    kernel = Base.front(Base.front(Base.size(layer.mask)))
    check_channels(layer, size, length(kernel) + 1, Base.size(layer.mask, length(kernel) + 1))
    borders, padded = with_borders(size, pad, 0)
    windows = Windows(padded, kernel, stride, dilation)
    W, mask, b, relu, σ = for_kernels(layer)
    dense = DenseKernel(windows, W, b, relu)
    sparse = SparseWindows(windows, W, mask, b, relu)
    panels, single = fastest(choice, (sparse,), dense, panel(dense)...), fastest(choice, (sparse,), dense, sample(dense)...)
    return [borders; FastLayer(panels, single, σ)], (windows.output..., length(b))
end

function fast_layers(norm::BatchNorm, size, choice)
    norm.track_stats || throw(ArgumentError("BatchNorm must track its statistics to be sparsified"))
    check_channels(norm, size, length(size), norm.chs)
    (; λ, β, γ, μ, σ², ϵ, affine) = norm
    scale = Array{Float32}((affine ? γ : 1) ./ sqrt.(σ² .+ ϵ))
    shift = Array{Float32}((affine ? β : 0) .- μ .* scale)
    return [FastLayer(Scaling(prod(size), scale, shift), λ === identity ? nothing : NNlib.fast_act(λ, scale))], size
end

function fast_layers(pool::Union{Flux.MaxPool,Flux.MeanPool}, size, choice)
    (; k, pad, stride) = pool
    return pooled(size, k, pad, stride, pool isa Flux.MeanPool)
end
fast_layers(pool::Union{Flux.GlobalMaxPool,Flux.GlobalMeanPool}, size, choice) =
    pooled(size, Base.front(size), map(zero, Base.front(size)), map(one, Base.front(size)), pool isa Flux.GlobalMeanPool)
function fast_layers(pool::Union{Flux.AdaptiveMaxPool,Flux.AdaptiveMeanPool}, size, choice)
    places = Base.front(size)
    stride = places .÷ pool.out
    k = places .- (pool.out .- 1) .* stride
    return pooled(size, k, map(zero, k), stride, pool isa Flux.AdaptiveMeanPool)
end

function pooled(size, k, pad, stride, mean)
    borders, padded = with_borders(size, pad, mean ? 0 : -Inf)
    windows = Windows(padded, k, stride, map(one, k))
    return [borders; FastLayer(Pooling(windows, mean))], (windows.output..., last(size))
end

"A padding, if there is anything to pad, and the size of what comes out."
function with_borders(size, pad, value)
    n = length(size) - 1
    before, behind = length(pad) == n ? (pad, pad) : (pad[1:2:end], pad[2:2:end])
    all(iszero, pad) && return FastLayer[], size
    padded = (Base.front(size) .+ before .+ behind..., last(size))
    return [FastLayer(Padding(size, padded, (before..., 0), value))], padded
end

check_channels(part, size, dims, channels) = length(size) == dims && last(size) == channels || throw(DimensionMismatch(
    "$(sprint(show, part)) takes $(dims - 1 == 0 ? "$channels features" : "$channels channels") but gets samples of size $size"))

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
    print(io, "SparseNetwork(", join(map(size -> join(size, "×"), net.sizes), " => "))
    print(io, "; density=", round(net.density; sigdigits = 3), ")")
    return nothing
end

features(net::SparseNetwork) = prod(first(net.sizes))
outputs(net::SparseNetwork) = outputs(last(net.layers).panels)

(net::SparseNetwork)(x::AbstractVector) = vec(net(reshape(x, :, 1)))
function (net::SparseNetwork)(x::AbstractMatrix)
    y = Matrix{Float32}(undef, outputs(net), size(x, 2))
    infer!(y, net, convert(Matrix{Float32}, x))
    return y
end
(net::SparseNetwork)(x::AbstractArray) = net(reshape(x, :, size(x, ndims(x))))

"Write the network's outputs for `x` to `y`, and return whether all of `x` is finite."
function infer!(y, net, x)
    size(x, 1) == features(net) || throw(DimensionMismatch("x must have $(features(net)) features, not $(size(x, 1))"))
    n = size(x, 2)
    n <= net.few && return with_scratch(buffers -> all(infer_one!(y, net, x, i, vec.(buffers)...) for i in 1:n), net)
    threads = Threads.nthreads()
    width = LANES * clamp(cld(n, LANES * threads), 1, net.vectors)
    panels = Panels(cld(n, width))
    tasks = [Threads.@spawn(take_panels!(panels, y, net, x, width)) for _ in 2:min(threads, panels.count)]
    try
        take_panels!(panels, y, net, x, width)
    finally
        await(panels, tasks)
    end
    return panels.finite
end

"Panels that tasks take one after the other, so that a task that begins late, or is interrupted, takes fewer of them."
mutable struct Panels
    const count::Int
    @atomic next::Int
    @atomic done::Int
    @atomic finite::Bool
end
Panels(count) = Panels(count, 0, 0, true)

function take_panels!(panels, y, net, x, width)
    panels.next < panels.count || return nothing
    return with_scratch(net) do buffers
        while (p = @atomic panels.next += 1) <= panels.count
            samples = ((p - 1) * width + 1):min(p * width, size(x, 2))
            infer_panel!(y, net, x, samples, buffers..., width) || (@atomic panels.finite = false)
            @atomic panels.done += 1
        end
    end
end

"Wait until all panels are done, at first without giving up the processor: usually that is sooner than another task could be run."
function await(panels, tasks)
    until = time_ns() + 50_000
    while panels.done < panels.count
        time_ns() < until || return foreach(wait, tasks)
        GC.safepoint()
    end
    return nothing
end

function with_scratch(f, net)
    buffers = take!(net.scratch)
    try
        return f(buffers)
    finally
        put!(net.scratch, buffers)
    end
end

function infer_panel!(y, net, x, samples, one, other, width)
    n, m = features(net), outputs(net)
    given = GC.@preserve x one Rows(pointer(x, (first(samples) - 1) * n + 1), n, length(samples), pointer(one), true)
    GC.@preserve x one for (i, layer) in enumerate(net.layers)
        input = i > 1 || !(layer.panels isa SparseKernel) ? one : given
        i == 1 && input === one &&
            (given.finite = transpose_into!(pointer(one), width, given.from, n, n, length(samples)))
        multiply_panel!(other, input, layer.panels, width)
        isnothing(layer.σ) || activate!(layer.σ, other, width * outputs(layer.panels))
        one, other = other, one
    end
    GC.@preserve y one transpose_into!(pointer(y, (first(samples) - 1) * m + 1), m, pointer(one), width, length(samples), m)
    return given.finite
end

multiply_panel!(y, x, kernel, width) =
    width == LANES ? multiply!(y, x, kernel, Val(1)) : width == 2LANES ? multiply!(y, x, kernel, Val(2)) :
    width == 3LANES ? multiply!(y, x, kernel, Val(3)) : multiply!(y, x, kernel, Val(4))

function infer_one!(y, net, x, i, one, other)
    n, m = features(net), outputs(net)
    copyto!(one, 1, x, (i - 1) * n + 1, n)
    finite = iszero(sum(value -> 0 * value, view(one, 1:n)))
    for layer in net.layers
        multiply!(other, one, layer.single)
        isnothing(layer.σ) || activate!(layer.σ, other, outputs(layer.single))
        one, other = other, one
    end
    copyto!(y, (i - 1) * m + 1, one, 1, m)
    return finite
end

function activate!(σ, values, n)
    part = view(values, 1:n)
    part .= σ.(part)
    return values
end
