"A layer as it is computed in panels and for single samples; `σ` is `nothing` where kernels apply the activation."
struct FastLayer
    panels::Union{SparseKernel,DenseKernel}
    single::Union{SparseRows,DenseKernel}
    σ::Any
end

"""
    SparseNetwork

What [`sparsify`](@ref) returns: a function of inputs `(features, n)` or `(features,)`, for inference only. Several tasks
may call it at once.
"""
struct SparseNetwork
    layers::Vector{FastLayer}
    scratch::Channel{NTuple{2,Matrix{Float32}}}
end

"""
    sparsify(model; kernels = :auto) -> SparseNetwork

The network as a function whose work is proportional to the weights that are kept: outputs as those of `model` to
rounding, `(outputs, n)` for inputs `(features, n)`, in `Float32`. For a `Chain` of prunable layers without convolutions, in test
mode; later changes of `model` do not reach it. It uses the threads that Julia was started with, for batches.

A layer that is not sparse enough stays dense. With `:auto` both kernels are timed on random inputs, for batches and for
single samples, and the faster is taken; `:sparse` and `:dense`, for the network or one per layer, force the choice.
Inputs must be finite.

Throws `ArgumentError` for other models and other `kernels`.

# Examples
```jldoctest
julia> model = prune!(prunable(Chain(Dense(784 => 300, relu), Dense(300 => 10))), Magnitude(); sparsity = 0.95);

julia> fast = sparsify(model)
SparseNetwork(784 => 300 => 10; density=0.05)

julia> x = rand(Float32, 784, 100); fast(x) ≈ model(x)
true
```
"""
function sparsify(model; kernels = :auto)
    layers = perceptron(model)
    choices = kernels isa Symbol ? fill(kernels, length(layers)) : kernels
    length(choices) == length(layers) && all(in((:auto, :sparse, :dense)), choices) || throw(ArgumentError(
        "kernels must be :auto, :sparse or :dense, or one of these per layer ($(length(layers))), not $kernels"))
    fast = map(fast_layer, layers, choices)
    width = maximum(layer -> maximum(size(layer.mask)), layers)
    scratch = Channel{NTuple{2,Matrix{Float32}}}(2 * Threads.nthreads())
    foreach(_ -> put!(scratch, Tuple(zeros(Float32, MAX_VECTORS * LANES, width) for _ in 1:2)), 1:(2 * Threads.nthreads()))
    return SparseNetwork(fast, scratch)
end

function fast_layer(layer, choice)
    W, mask = Array{Float32}(weight(mask!(layer))), Array{Bool}(layer.mask)
    b, σ = bias(layer) === false ? zeros(Float32, size(W, 1)) : Array{Float32}(bias(layer)), layer.dense.σ
    fused = σ === NNlib.relu
    after = fused || σ === identity ? nothing : NNlib.fast_act(σ, W)
    dense = DenseKernel(W, b, fused)
    for_panels, for_one = (SparseKernel(W, mask, b, fused), dense), (SparseRows(W, mask, b, fused), dense)
    choice === :auto || (i = choice === :sparse ? 1 : 2; return FastLayer(for_panels[i], for_one[i], after))
    panels = map(_ -> rand(Float32, MAX_VECTORS * LANES, maximum(size(W))), 1:2)
    single = map(_ -> rand(Float32, maximum(size(W))), 1:2)
    return FastLayer(for_panels[argmin(map(kernel -> seconds(multiply!, panels..., kernel, Val(MAX_VECTORS)), for_panels))],
                     for_one[argmin(map(kernel -> seconds(multiply!, single..., kernel), for_one))], after)
end

"How long a call takes at best."
seconds(f, arguments...) = minimum(_ -> @elapsed(f(arguments...)), 1:8)

function Base.show(io::IO, net::SparseNetwork)
    kernels = [layer.panels for layer in net.layers]
    print(io, "SparseNetwork(", first(kernels).inputs)
    foreach(kernel -> print(io, " => ", kernel.outputs), kernels)
    kept = sum(nonzeros, kernels) / sum(kernel -> kernel.inputs * kernel.outputs, kernels)
    print(io, "; density=", round(kept; sigdigits = 3), ")")
    return nothing
end

nonzeros(kernel::SparseKernel) = length(kernel.values)
nonzeros(kernel::DenseKernel) = count(!iszero, kernel.W)

inputs(net::SparseNetwork) = first(net.layers).panels.inputs
outputs(net::SparseNetwork) = last(net.layers).panels.outputs

(net::SparseNetwork)(x::AbstractVector) = vec(net(reshape(x, :, 1)))
function (net::SparseNetwork)(x::AbstractMatrix)
    y = Matrix{Float32}(undef, outputs(net), size(x, 2))
    infer!(y, net, convert(Matrix{Float32}, x))
    return y
end
(net::SparseNetwork)(x::AbstractArray) = net(reshape(x, :, size(x, ndims(x))))

"Write the network's outputs for `x` to `y`, and return whether all of `x` is finite."
function infer!(y, net, x)
    size(x, 1) == inputs(net) || throw(DimensionMismatch("x must have $(inputs(net)) features, not $(size(x, 1))"))
    n = size(x, 2)
    n == 1 && return with_scratch(buffers -> infer_one!(y, net, x, vec.(buffers)...), net)
    threads = Threads.nthreads()
    width = LANES * clamp(cld(n, LANES * threads), 1, MAX_VECTORS)
    part = max(cld(cld(n, width), threads), 1) * width
    tasks = [Threads.@spawn infer_panels!(y, net, x, samples, width) for samples in Iterators.partition((part + 1):n, part)]
    finite = infer_panels!(y, net, x, 1:min(part, n), width)
    return mapreduce(fetch, &, tasks; init = finite)
end

infer_panels!(y, net, x, samples, width) = with_scratch(net) do buffers
    finite = true
    for panel in Iterators.partition(samples, width)
        finite &= infer_panel!(y, net, x, panel, buffers..., width)
    end
    return finite
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
    n, m = inputs(net), outputs(net)
    given = GC.@preserve x one Rows(pointer(x, (first(samples) - 1) * n + 1), n, length(samples), pointer(one), true)
    GC.@preserve x one for (i, layer) in enumerate(net.layers)
        input = i > 1 || !(layer.panels isa SparseKernel) ? one : given
        i == 1 && input === one &&
            (given.finite = transpose_into!(pointer(one), width, given.from, n, n, length(samples)))
        multiply_panel!(other, input, layer.panels, width)
        isnothing(layer.σ) || activate!(layer.σ, other, width * layer.panels.outputs)
        one, other = other, one
    end
    GC.@preserve y one transpose_into!(pointer(y, (first(samples) - 1) * m + 1), m, pointer(one), width, length(samples), m)
    return given.finite
end

multiply_panel!(y, x, kernel, width) =
    width == LANES ? multiply!(y, x, kernel, Val(1)) : width == 2LANES ? multiply!(y, x, kernel, Val(2)) :
    width == 3LANES ? multiply!(y, x, kernel, Val(3)) : multiply!(y, x, kernel, Val(4))

function infer_one!(y, net, x, one, other)
    copyto!(one, x)
    for layer in net.layers
        multiply!(other, one, layer.single)
        isnothing(layer.σ) || activate!(layer.σ, other, layer.single.outputs)
        one, other = other, one
    end
    copyto!(y, 1, one, 1, length(y))
    return iszero(sum(value -> 0 * value, x))
end

function activate!(σ, values, n)
    part = view(values, 1:n)
    part .= σ.(part)
    return values
end
