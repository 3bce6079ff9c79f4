features(net::SparseNetwork) = prod(first(net.sizes))
outputs(net::SparseNetwork) = outputs(last(net.panels).kernel)

(net::SparseNetwork)(x::AbstractVector) = vec(net(reshape(x, :, 1)))
function (net::SparseNetwork)(x::AbstractMatrix)
    y = Matrix{Float32}(undef, outputs(net), size(x, 2))
    infer!(y, net, convert(Matrix{Float32}, x)) || throw(ArgumentError("x must be finite"))
    return y
end
function (net::SparseNetwork)(x::AbstractArray)
    given, dims = Base.front(size(x)), first(net.sizes)
    given == dims || length(dims) == 1 || throw(DimensionMismatch("x must have samples of size $dims, not $given"))
    return net(reshape(x, prod(given), size(x, ndims(x))))
end

"Write the network's outputs for `x` to `y`, and return whether all of `x` is finite."
function infer!(y, net, x)
    size(x, 1) == features(net) || throw(DimensionMismatch("x must have $(features(net)) features, not $(size(x, 1))"))
    n = size(x, 2)
    n <= net.few && return with_scratch(net) do buffers
        mapreduce(i -> infer_one!(y, net, x, i, vec.(buffers)...), &, 1:n; init = true)
    end
    threads = Threads.nthreads()
    width = LANES * clamp(cld(n, LANES * threads), 1, net.vectors)
    finite = Threads.Atomic{Bool}(true)
    share(cld(n, width)) do panels
        with_scratch(net) do buffers
            for p in panels
                samples = ((p - 1) * width + 1):min(p * width, n)
                infer_panel!(y, net, x, samples, buffers..., width) || (finite[] = false)
            end
        end
    end
    return finite[]
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
    GC.@preserve x one for (i, layer) in enumerate(net.panels)
        input = i > 1 || !(layer.kernel isa SparseKernel) ? one : given
        i == 1 && input === one &&
            (given.finite = transpose_into!(pointer(one), width, given.from, n, n, length(samples)))
        multiply_panel!(other, input, layer.kernel, width)
        isnothing(layer.σ) || activate!(layer.σ, other, width * outputs(layer.kernel))
        one, other = other, one
    end
    GC.@preserve y one transpose_into!(pointer(y, (first(samples) - 1) * m + 1), m, pointer(one), width, length(samples), m)
    return given.finite
end

# Those wider than PANEL_VECTORS are not even compiled.
multiply_panel!(y, x, kernel, width) =
    width == LANES ? multiply!(y, x, kernel, Val(1)) :
    width == 2LANES || PANEL_VECTORS == 2 ? multiply!(y, x, kernel, Val(2)) :
    width == 3LANES ? multiply!(y, x, kernel, Val(3)) : multiply!(y, x, kernel, Val(4))

function infer_one!(y, net, x, i, one, other)
    n, m = features(net), outputs(net)
    copyto!(one, 1, x, (i - 1) * n + 1, n)
    finite = iszero(sum(value -> 0 * value, view(one, 1:n)))
    for layer in net.single
        multiply!(other, one, layer.kernel)
        isnothing(layer.σ) || activate!(layer.σ, other, outputs(layer.kernel))
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
