using Flux, LinearAlgebra, PrunableFlux, Random, Test
using PrunableFlux: masked_mul

randmask(size...) = rand(Xoshiro(7), Bool, size...)

@testset "constructors are those of Dense" begin
    W, b = randn(Float32, 3, 4), randn(Float32, 3)
    for (ours, dense) in ((PrunableDense(W), Dense(W)), (PrunableDense(W, b), Dense(W, b)),
                          (PrunableDense(W, false, tanh), Dense(W, false, tanh)),
                          (PrunableDense(Dense(W, b, relu)), Dense(W, b, relu)))
        x = randn(Float32, 4, 5)
        @test ours(x) == dense(x)
        @test all(ours.mask)
    end
    layer = PrunableDense(4 => 3, relu; bias = false, init = Flux.ones32)
    @test layer.dense.weight == ones(3, 4) && layer.dense.bias === false && layer.dense.σ === relu
    @test PrunableDense(Dense(W), trues(3, 4)).mask isa BitMatrix
    @test PrunableDense(Dense(W)).mask isa Matrix{Bool}
    @test PrunableDense(Dense(W)).dense.weight === W
    @test_throws DimensionMismatch PrunableDense(Dense(W), trues(4, 3))
end

@testset "a weight has memory of its own" begin
    @test_throws "not the Adjoint of another" PrunableDense(randn(3, 4)')
    W = randn(Float32, 3, 4)
    @test_throws "not the Transpose of another" prunable(Chain(Dense(W), Dense(transpose(W))))
end

@testset "forward is σ.((W .* M) * x .+ b) whatever W holds, $M" for M in (Matrix{Bool}, BitMatrix)
    mask = M(randmask(5, 4))
    for T in (Float32, Float64), σ in (identity, relu, tanh), x in (randn(T, 4), randn(T, 4, 7), randn(T, 4, 3, 2))
        W, b = randn(T, 5, 4), randn(T, 5)
        expected = reshape(σ.((W .* mask) * reshape(x, 4, :) .+ b), 5, size(x)[2:end]...)
        for stray in (zero(T), T(NaN), T(Inf), T(3))
            layer = PrunableDense(Dense(ifelse.(mask, W, stray), b, σ), mask)
            @test layer(x) ≈ expected
            @test all(iszero, layer.dense.weight[.!mask])
        end
    end
    @test_throws DimensionMismatch PrunableDense(4 => 5)(randn(Float32, 3))
    onehot = Flux.onehotbatch([1, 3, 4], 1:4)
    layer = PrunableDense(Dense(randn(Float32, 5, 4)), mask)
    @test layer(onehot) ≈ (layer.dense.weight .* mask) * Matrix{Float32}(onehot) .+ layer.dense.bias
end

@testset "gradients are those of the literal masked layer" begin
    W, b, mask = randn(5, 4), randn(5), randmask(5, 4)
    for x in (randn(4), randn(4, 6), randn(4, 3, 2))
        literal(W, b, x) = sum(abs2, tanh.((W .* mask) * reshape(x, 4, :) .+ b))
        ours(W, b, x) = sum(abs2, PrunableDense(Dense(W, b, tanh), mask)(x))
        for (g, expected) in zip(Flux.gradient(ours, copy(W), b, x), Flux.gradient(literal, W, b, x))
            @test g ≈ expected
        end
        @test all(iszero, Flux.gradient(ours, copy(W), b, x)[1][.!mask])
    end
    x = randn(4, 6)
    loss(W) = sum(abs2, masked_mul(copy(W), mask, x))
    step = 1e-6
    numeric = map(eachindex(W)) do i
        up, down = copy(W), copy(W)
        up[i] += step
        down[i] -= step
        (loss(up) - loss(down)) / 2step
    end
    @test vec(Flux.gradient(W -> sum(abs2, masked_mul(W, mask, x)), copy(W))[1]) ≈ numeric rtol = 1e-6
end

forward(layer, x) = sum(layer(x))
weight_gradient(layer, x) = Flux.gradient(forward, layer, x)[1].dense.weight

@testset "the rule allocates nothing of W's size beyond the gradient" begin
    n, x = 512, randn(Float32, 512, 2)
    layer = PrunableDense(Dense(randn(Float32, n, n)), randmask(n, n))
    plain = Dense(randn(Float32, n, n))
    plain_gradient(layer, x) = Flux.gradient(forward, layer, x)[1].weight
    weight_gradient(layer, x), plain_gradient(plain, x), layer(x), plain(x)
    layer.dense.weight .= 1
    @test (@allocated layer(x)) <= (@allocated plain(x)) + 1024
    layer.dense.weight .= 1
    @test (@allocated weight_gradient(layer, x)) <= (@allocated plain_gradient(plain, x)) + 4096
    @test (@allocated weight_gradient(layer, x)) < 1.5 * sizeof(plain.weight)
end

@testset "a Flux layer" begin
    layer = PrunableDense(Dense(randn(Float32, 3, 4), true, relu), randmask(3, 4))
    @test length(Flux.trainables(layer)) == 2
    @test Flux.trainable(layer) == (; dense = layer.dense)
    @test repr(layer) == "PrunableDense(4 => 3, relu; density=$(round(count(layer.mask) / 12; sigdigits = 3)))"
    @test occursin("bias=false, density=1.0", repr(PrunableDense(4 => 3; bias = false)))
    @test occursin("PrunableDense(4 => 3, relu; density=", sprint(show, MIME("text/plain"), Chain(layer, layer)))

    for (to, T) in ((f16, Float16), (f32, Float32), (f64, Float64))
        moved = to(layer)
        @test eltype(moved.dense.weight) == T && moved.mask == layer.mask && eltype(moved.mask) == Bool
    end
    @test Flux.outputsize(Chain(layer, PrunableDense(3 => 2)), (4, 5)) == (2, 5)
    @test fmap(identity, layer) == layer || fmap(identity, layer).mask === layer.mask
    @test fmap(x -> x isa AbstractArray ? copy(x) : x, layer).mask == layer.mask

    flat, rebuild = Flux.destructure(Chain(layer))
    @test length(flat) == 15
    @test rebuild(2flat)[1].dense.weight == 2layer.dense.weight && rebuild(flat)[1].mask == layer.mask

    other = PrunableDense(4 => 3, relu)
    Flux.loadmodel!(other, Flux.state(layer))
    @test other.dense.weight == layer.dense.weight && other.mask == layer.mask
    Flux.loadmodel!(PrunableDense(4 => 3), layer)
end

@testset "prunable and unprunable" begin
    shared = Dense(4 => 4, relu)
    model = Chain(shared, Dropout(0.5), Parallel(+, shared, Chain(BatchNorm(4), Dense(4 => 4))), x -> 2x, Dense(4 => 2))
    ours = prunable(model)
    @test length(prunables(ours)) == 3
    @test ours[1] === ours[3].layers[1]
    @test ours[2] isa Dropout && ours[3].layers[2][1] isa BatchNorm
    @test ours[1].dense.weight === shared.weight
    @test map(l -> size(l.dense.weight), prunables(ours)) == [(4, 4), (4, 4), (2, 4)]
    @test prunable(ours)[1] === ours[1]
    x = randn(Float32, 4, 3)
    @test ours(x) == model(x)
    back = unprunable(ours)
    @test back[1] isa Dense && back[1].weight === shared.weight && isempty(prunables(back))
    prune!(ours, Magnitude(); sparsity = 0.5)
    @test unprunable(ours)(x) ≈ ours(x)
    attention = prunable(MultiHeadAttention(8; nheads = 2))
    @test length(prunables(attention)) == 4
    @test prunable(Dense(2 => 3)) isa PrunableDense
end
